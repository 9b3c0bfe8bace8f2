"""Cost of a computation: its operations, and the least time that a device needs for them."""
