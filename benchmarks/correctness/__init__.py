"""Is it right? Averagers of weights, each in its own process, on the same scripted trainings.

``scripts`` says which weights a training goes through, a file of ``peers`` drives one package
through it as its documentation says, and a file of ``questions`` looks at what came out.
"""
