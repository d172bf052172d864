"""What can be learned: one module per task, each with its head, its batches, its loss and its measure."""
