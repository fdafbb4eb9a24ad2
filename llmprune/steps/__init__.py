"""The steps that a run is made of, each from a folder to a smaller or sparser one."""
