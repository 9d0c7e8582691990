"""--mode=plan: the run's own programs, compiled for devices that are not there, and what they cost.

topologies.py  the devices and their published figures
lowering.py    the train step, prefill, decode and publish of a config, from shapes alone
hlo.py         a compiled program's text as instructions
products.py    the FLOPs of one instruction
costs.py       FLOPs, bytes of memory and of collectives in a program, loops times their trips
choosing.py    micro-batches that fit, by estimate
report.py      memory, time and what to change, as a table
"""
