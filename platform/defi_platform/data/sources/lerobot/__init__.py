"""LeRobot datasets of versions 2.1 and 3.0: their folder goes in, records of episodes and their signals come out."""
