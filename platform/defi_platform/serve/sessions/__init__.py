"""What the server keeps of one client: its episode, its seeds, and the actions it has not carried out yet."""
