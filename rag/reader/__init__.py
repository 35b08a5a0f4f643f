"""Reading: passages and a question become a short answer with its source, or none where the passages do not say."""
