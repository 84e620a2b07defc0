"""What is saved: the tensors of a module, their ties, and the small files beside them; and how they come back."""
