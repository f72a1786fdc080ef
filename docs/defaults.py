"""The reference gives a parameter the default of its function's signature.

The parser of docstrings takes the first choice in braces for it, which is wrong where the signature
has None.
"""

import griffe


class SignatureDefaults(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_) -> None:
        if func.docstring is None:
            return
        for section in func.docstring.parsed:
            if section.kind is griffe.DocstringSectionKind.parameters:
                for parameter in section.value:
                    if parameter.name in func.parameters:
                        parameter.value = func.parameters[parameter.name].default
