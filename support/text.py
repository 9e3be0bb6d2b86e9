"""A text that a model wrote."""


class Text(str):
    """cut: did it end at the limit of tokens?"""

    def __new__(cls, string, cut=False):
        text = super().__new__(cls, string)
        text.cut = cut
        return text
