"""The rooms of the DPO script. The floor (errors, settings, runtime) imports nothing of ours."""
