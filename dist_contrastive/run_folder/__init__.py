"""The folder of a run: what its files are called, who may write to it, how the run is, what it leaves for those who use it.

`names` · `config` · `folder`, for the run that writes it · `status`, for whoever asks how it is · `trained`, for whatever uses
its result.
"""
