"""Writers: recorded frames and signals go in, H.264 video and LeRobot datasets come out."""
