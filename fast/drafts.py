"""Drafts: guesses of how a reply goes on, made of what was said in other replies.

Every token of every reply is drawn with a uniform number of its own. So a guess can be read together with
what is certain, and the tokens that are then drawn along it are those that would have been drawn one by one:
a right guess saves passes, and a wrong one costs only its own computation. Replies are short and mostly
format, so counts of which token followed the last few are guess enough.
"""

from collections import Counter, defaultdict
from collections.abc import Collection

CONTEXT = 8  # the most tokens before a token that count
SURE = 0.6  # a draft ends where it would be right with less than this probability
START = (-1, -1)  # stands before every text, so that its first token has a context too


class Drafts:
    """Counts of tokens by their context: the last 2 to CONTEXT tokens of the text before them. There are no
    drafts without texts to begin with, since what random replies have said guesses nothing, and none any more
    when less than half of what was drafted so far was what a reply drew."""

    def __init__(self, texts: list[list[int]] | None):
        self.next: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self.used, self.drafted, self.right = bool(texts), 0, 0  # the last two: tokens
        for text in texts or ():
            self.learn(text)

    def learn(self, text: list[int], start: int = 0) -> None:
        """Counts the tokens of a text from `start` on."""
        tokens = (*START, *text)
        for t in range(start + len(START), len(tokens)) if self.used else ():
            for n in range(2, min(CONTEXT, t) + 1):
                self.next[tokens[t - n : t]][tokens[t]] += 1

    def count(self, drafted: int, right: int) -> None:
        """Of so many drafted tokens so many were right."""
        self.drafted, self.right = self.drafted + drafted, self.right + right
        self.used &= 2 * self.right >= self.drafted

    def draft(self, text: list[int], limit: int, end_ids: Collection[int]) -> list[int]:
        """The likeliest tokens, at most `limit`, that follow a text: in each place what has followed the
        longest context that is known. The token that would end it is left out."""
        before, drafted, sure = [*START, *text], [], 1.0
        while self.used and len(drafted) < limit:
            contexts = (tuple(before[-n:]) for n in range(min(CONTEXT, len(before)), 1, -1))
            counts = next((self.next[context] for context in contexts if context in self.next), None)
            if not counts:
                break
            token, count = counts.most_common(1)[0]
            sure *= count / (counts.total() + 0.1)
            if sure < SURE or token in end_ids:
                break
            before.append(token)
            drafted.append(token)
        return drafted
