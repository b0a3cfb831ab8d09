"""How an answer is spelled: caches, beam search and the decode loop."""
