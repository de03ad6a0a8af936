"""Extensions of the site beside the pages in docs/. Each build generates the reference from the code."""
