"""--slo-admission: would a prompt's first token come too late? Judged by how fast prompts got through lately.

Counts the prompt tokens that wait for a first token, and how many of them get there per second while some always wait.
That speed holds whatever the reason for waiting is: prompts being computed, rows or cache being full. A stretch in
which prompts waited for a while measures the speed; a short one, which ended because nobody waited any more, only says
that it is at least so much. Where nothing waits nobody is refused: it would help no one.

Reads no clock: the caller says what time it is.
"""

from __future__ import annotations

MEASURED_S = 0.5  # a stretch of waiting this long measures
WEIGHT = 0.5  # of a new measurement


class Admission:
    def __init__(self):
        self.num_waiting_tokens = 0  # of prompts that have no first token yet
        self.tokens_per_s = 0.0  # at which they get there; 0: not known yet
        self._since_s = 0.0  # begin of the stretch
        self._num_done_tokens = 0  # in it

    def on_wait(self, num_tokens: int, now_s: float) -> None:
        """A prompt has been let in."""
        if self.num_waiting_tokens == 0:
            self._since_s, self._num_done_tokens = now_s, 0
        self.num_waiting_tokens += num_tokens

    def on_first_token(self, num_tokens: int, now_s: float) -> None:
        self._num_done_tokens += num_tokens
        self.on_leave(num_tokens)
        stretch_s = now_s - self._since_s
        if stretch_s <= 0 or (self.num_waiting_tokens > 0 and stretch_s < MEASURED_S):
            return
        speed = self._num_done_tokens / stretch_s
        if stretch_s < MEASURED_S:
            self.tokens_per_s = max(self.tokens_per_s, speed)
        else:
            self.tokens_per_s += (WEIGHT if self.tokens_per_s else 1.0) * (speed - self.tokens_per_s)
        self._since_s, self._num_done_tokens = now_s, 0

    def on_leave(self, num_tokens: int) -> None:
        """A prompt will have no first token: its client has gone, or it was refused."""
        self.num_waiting_tokens -= num_tokens

    def predicted_ttft_s(self, num_tokens: int) -> float:
        """Of a prompt that would join those that wait; 0 if none does, or nothing is known."""
        if self.num_waiting_tokens == 0 or self.tokens_per_s == 0:
            return 0.0
        return (self.num_waiting_tokens + num_tokens) / self.tokens_per_s
