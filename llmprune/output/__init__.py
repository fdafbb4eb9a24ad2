"""What a run leaves on disk and on the Hub: shards, the unfinished run, the model card; and whether it is still whole."""
