"""The hosts of the data planes: who they are, what each is to hold, and their link to the control plane."""
