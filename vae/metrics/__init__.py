"""What a trained model is worth: likelihoods, and how far its code separates known factors."""
