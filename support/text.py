"""A text that a model wrote."""


class Text(str):
    """cut: did it end at the limit of tokens?"""

    cut = False


def text_of(string, cut):
    text = Text(string)
    text.cut = cut
    return text
