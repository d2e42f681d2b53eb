"""Beginnings of texts of several kinds, for what goes on from them."""

PROMPTS = (
    "Why is the sky blue?",
    "The capital of France is",
    "Once upon a time there was a small fox who",
    "Water boils at",
    "In the following we describe how to bake a simple loaf of bread at home. First, mix the flour",
    "def fibonacci(n):",
    "The three most important inventions of the nineteenth century were the telegraph, the steam engine and",
    "My favourite season is autumn, because",
    "Question: How many legs does a spider have?\nAnswer:",
    "The mitochondria are",
    "Dear Sir or Madam, I am writing to you about the bicycle that I bought last week. It",
    "A list of fruit: apples, pears,",
)
