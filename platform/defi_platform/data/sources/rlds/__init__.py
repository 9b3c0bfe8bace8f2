"""Open X-Embodiment RLDS: a folder of TFRecords goes in, records of episodes and their signals come out."""
