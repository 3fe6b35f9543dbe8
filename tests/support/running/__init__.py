"""How a run goes: its order, its time profile, and what dynamo leaves out."""
