"""Finding passages: words (BM25), vectors (FAISS or Milvus), both fused, the best of them ranked again."""
