"""The loop that visits each running request in each call, for schedulers whose requests do not all get a token a call.

Priorities, and a threshold for long prefills, break what the fast loop rests on: that at most one prompt is computed in
part, that every decoding request gets a token in each call, and that the last of the running list is the victim. Here
every request is visited and every block is told apart (see `stepcal.simulator.groups`), one call after the other.
"""
