"""What dynamo does differently in the frames that it traces for our backend."""
