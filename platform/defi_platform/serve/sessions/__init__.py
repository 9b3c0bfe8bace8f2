"""Sessions: the episode, the seeds and the actions of a chunk that a server keeps for one client."""
