"""Dynamo's or torch.export's graph -> the one IR that the passes read."""
