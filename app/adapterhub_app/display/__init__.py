"""How answers, tasks and notices are written for the page. Plain functions."""
