"""The study's arms as a small program: ``python -m impact_optim`` trains them side by side and reports."""
