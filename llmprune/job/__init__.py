"""One job: what is asked, what it says as it works, and the record that it leaves."""
