"""Ray Serve: a policy folder goes in, a server comes out that answers robots' observations with action chunks."""
