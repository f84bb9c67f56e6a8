"""What `weft demo` runs, and the data that every Python has."""
