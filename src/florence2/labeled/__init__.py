"""Images that people have labeled, whatever they were labeled with, for training and evaluation."""
