"""The gates, in the order in which they are tried. A new one is a file beside this one, and a row here."""

from assay.gates import build, equivalence, provenance, tests

GATES = (build.GATE, tests.GATE, equivalence.GATE, provenance.GATE)
NAMES = tuple(gate.name for gate in GATES)
OPTIONAL = tuple(gate.name for gate in GATES if gate.asked is not None)
"""Those that may be left out on request."""
REJECTIONS = tuple(dict.fromkeys(word for gate in GATES for word in gate.rejects))
INSTALLS = tuple(dict.fromkeys(name for gate in GATES for name in gate.installs))
