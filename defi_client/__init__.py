"""Client of a served policy for robot computers: connection, control loop, safety limits, recording."""

__version__ = "0.1.0"
