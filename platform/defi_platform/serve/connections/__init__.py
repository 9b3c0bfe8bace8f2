"""The clients' sockets of a replica: passed in by the listener, served on one loop, moved to another replica or closed."""
