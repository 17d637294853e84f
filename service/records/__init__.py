"""The only truth: what was received, what is to be done about it, what was done, and what left.

The records are also the queue. Whoever works on a row claims it by compare-and-set; a broker, where there
is one, is no more than a doorbell.
"""
