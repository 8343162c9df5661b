"""What is wrong with this node, now: the fourteen failures judged from two scrapes, for a person who was just woken.

Reads only what the exporter exports, so that a node can be judged from afar as well as on it.
"""
