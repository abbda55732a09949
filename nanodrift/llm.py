"""The Python API: ``LLM(model).generate(prompts, SamplingParams(...))``.

    from nanodrift import LLM, SamplingParams
    with LLM() as llm:
        print(llm.generate("Once upon a time", SamplingParams(max_tokens=80))[0].text)

Text in and out around an Engine that runs in the calling thread; stop strings are watched for here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nanodrift import hub
from nanodrift.config import EngineConfig
from nanodrift.metrics import RequestTimes
from nanodrift.plan import Logprobs
from nanodrift.request import Request, SamplingParams
from nanodrift.server.tokenizer import Detokenizer, load_tokenizer
from nanodrift.startup import load_engine

Prompt = str | list[int]


@dataclass(frozen=True)
class RequestOutput:
    """One prompt's answer."""

    prompt: str | None  # None when the prompt came as token ids
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str  # stop | length | abort
    stop_reason: int | str | None  # the token id or string that ended it
    metrics: RequestTimes  # arrival, every token, and what follows from them
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    logprobs: list[Logprobs] | None = None  # of token_ids, if the params ask for them
    prompt_logprobs: list[Logprobs] | None = None  # of the prompt's tokens but the first, likewise


@dataclass
class _Running:
    prompt: str | None
    request: Request
    detokenizer: Detokenizer | None
    pieces: list[str] = field(default_factory=list)


class LLM:
    """A model ready to generate. ``engine_options`` are the fields of EngineConfig; unknown ones are an error."""

    def __init__(self, model: str | None = None, device: str = "auto", load_format: str = "auto", **engine_options):
        config = EngineConfig.from_options(device=device, load_format=load_format, **engine_options)
        with Console(stderr=True).status("loading") as status:  # drawn on a terminal only

            def report(phase: str, done: float) -> None:
                status.update(f"loading: {phase} {done:.0%}")

            folder = hub.resolve_model(model, load_format)
            self.tokenizer = load_tokenizer(folder, load_format)  # None: prompts are token ids
            self._loaded = load_engine(folder, config, report)
        self.engine = self._loaded.engine
        self.model_config = self._loaded.model_config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers prompts (strings or lists of token ids, one or many) in order, with one params or one each."""
        prompts = [prompts] if _is_one_prompt(prompts) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts came with {len(sampling_params)} sampling params: one, or one each"
            )
        running = [self._start(prompt, params) for prompt, params in zip(prompts, sampling_params, strict=True)]
        by_id = {one.request.request_id: one for one in running}
        for one in running:  # all are valid before the first is queued
            self.engine.scheduler.check(one.request)
        try:
            for one in running:
                self.engine.add(one.request)
            with _progress(len(running), is_shown=progress) as advance:
                while self.engine.has_work:
                    for event in self.engine.step():
                        one = by_id[event.request_id]
                        self._take(one, event.token_ids)
                        advance(len(event.token_ids), one.request.is_finished)
        except BaseException:
            for one in running:
                self.engine.abort(one.request.request_id)
            raise
        return [self._output(one) for one in running]

    def chat(
        self,
        messages: Sequence[dict] | Sequence[Sequence[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, each a list of {"role": ..., "content": ...}."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [self._needed_tokenizer().encode_chat(list(conversation)) for conversation in conversations]
        return self.generate(prompts, sampling_params, progress=progress)

    def close(self) -> None:
        """Gives the device's memory back; the LLM cannot be used afterwards."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _start(self, prompt: Prompt, params: SamplingParams) -> _Running:
        is_text = isinstance(prompt, str)
        prompt_token_ids = self._needed_tokenizer().encode(prompt) if is_text else list(prompt)
        request = self.engine.new_request(prompt_token_ids, params)
        if params.stop_strings:
            self._needed_tokenizer()
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(
                self.tokenizer, params.stop_strings, prompt_token_ids=prompt_token_ids, min_tokens=params.min_tokens
            )
        return _Running(prompt if is_text else None, request, detokenizer)

    def _take(self, one: _Running, token_ids: tuple[int, ...]) -> None:
        if one.detokenizer is None or one.detokenizer.stopped_by is not None:
            return
        one.pieces.append(one.detokenizer.push(token_ids))
        if one.detokenizer.stopped_by is not None:
            self.engine.abort(one.request.request_id, "stop", one.detokenizer.stopped_by)

    def _output(self, one: _Running) -> RequestOutput:
        request = one.request
        reasons = request.finish_reason, request.stop_reason
        if one.detokenizer is not None:
            one.pieces.append(one.detokenizer.finish())
            if one.detokenizer.stopped_by is not None:  # perhaps by the very last token, when the request had ended
                reasons = "stop", one.detokenizer.stopped_by
        return RequestOutput(
            prompt=one.prompt,
            prompt_token_ids=request.prompt_token_ids,
            text="".join(one.pieces),
            token_ids=request.output_token_ids,
            finish_reason=reasons[0],
            stop_reason=reasons[1],
            metrics=RequestTimes.of(request),
            num_cached_tokens=request.num_cached_tokens,
            logprobs=request.logprobs or None,
            prompt_logprobs=request.prompt_logprobs or None,
        )

    def _needed_tokenizer(self):
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give prompts as lists of token ids, without stop strings")
        return self.tokenizer


@contextlib.contextmanager
def _progress(num_requests: int, is_shown: bool) -> Iterator[Callable[[int, bool], None]]:
    """A bar over requests with the output rate beside it; silent unless the terminal can show it."""

    console, num_output_tokens = Console(stderr=True), 0
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    is_silent = not (is_shown and console.is_terminal)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=is_silent) as bar:
        task = bar.add_task("requests", total=num_requests, rate="")

        def advance(num_tokens: int, is_finished: bool) -> None:
            nonlocal num_output_tokens
            num_output_tokens += num_tokens
            elapsed_s = bar.tasks[0].elapsed
            rate = f"{num_output_tokens / elapsed_s:,.0f} tokens/s" if elapsed_s else ""
            bar.update(task, advance=int(is_finished), rate=rate)

        yield advance


def _is_one_prompt(prompts) -> bool:
    """A string, or a non-empty list of ints."""
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(token, int) for token in prompts))
