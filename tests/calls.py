"""The commands as functions, with the settings of their command lines: the first ones by position, too."""

from dataclasses import fields

from ditlit.commands import call, settings_of


def function_of(command):
    names = [field.name for field in fields(settings_of(command))]

    def run(*first, **settings):
        call(command, **dict(zip(names, first, strict=False)), **settings)

    return run


convert = function_of("convert")
encode = function_of("encode")
evaluate = function_of("evaluate")
evaluate_loss = function_of("evaluate loss")
evaluate_scaling = function_of("evaluate scaling")
evaluate_sweep = function_of("evaluate sweep")
sample = function_of("sample")
