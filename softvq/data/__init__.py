"""Files to tensors: safe decoding, crops, and folders of photographs as keyed streams of batches."""
