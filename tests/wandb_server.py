"""A stand-in for W&B's server: as much of its protocol as runs, sweeps and agents need.

It keeps what they send, and hands out a sweep's runs as W&B's own engine expands its grid.
"""

import gzip
import http.server
import json
import re
import threading

import sweeps
import yaml


class Server:
    """As a context manager, listens on a port of its own.

    `runs` maps a run's id to its config, history and state, and `sweeps` a sweep's to its config
    and the runs that were handed out. Once `silent` is set, it takes what it is sent and never
    answers; it sets that itself after the first rows of a run if it is `short_lived`.
    """

    def __init__(self):
        self.runs = {}
        self.sweeps = {}
        self.agents = {}
        self.lock = threading.Lock()
        self.silent = threading.Event()
        self.short_lived = False
        self.closed = threading.Event()
        handler = type("Handler", (Handler,), {"owner": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def speak(self):
        """Answer again, after being silent."""
        self.silent.clear()
        self.closed.set()

    def history(self, run):
        return [json.loads(line) for line in self.runs[run]["history"]]

    # Answers to the operations of W&B's GraphQL, by their names

    def RunResumeStatus(self, name, project, **_):
        run = self.runs.get(name)
        if run is None or not run["started"]:
            return {"model": None}
        last = run["history"][-1:]
        bucket = dict(
            id=name,
            name=name,
            displayName=name,
            config=json.dumps(run["config"]),
            tags=[],
            notes="",
            historyLineCount=len(run["history"]),
            historyTail=json.dumps(last),
            summaryMetrics="".join(last) or "{}",
            eventsLineCount=0,
            eventsTail="[]",
            logLineCount=0,
            wandbConfig=json.dumps({"t": 1}),
        )
        return {"model": dict(id=project, name=project, entity=ENTITY, bucket=bucket)}

    def UpsertBucket(self, name=None, config=None, state=None, project="", sweep=None, **rest):
        is_new = name not in self.runs
        if is_new:
            self.runs[name] = dict(config={}, history=[], state=None, exit=None)
            self.runs[name] |= dict(started=False, stopped=False)
        run = self.runs[name]
        run["started"] |= config is not None
        run["config"] |= json.loads(config or "{}")
        run["state"] = state or run["state"]
        run["sweep"] = sweep or run.get("sweep")
        bucket = dict(
            id=name,
            name=name,
            displayName=rest.get("displayName") or name,
            description="",
            sweepName=sweep,
            config=json.dumps(run["config"]),
            historyLineCount=len(run["history"]),
            project=dict(id=project, name=project, entity=ENTITY),
        )
        return {"upsertBucket": dict(bucket=bucket, inserted=is_new)}

    def RunStoppedStatus(self, runId, **_):
        return {"project": dict(run=dict(stopped=self.runs[runId]["stopped"]))}

    def CreateRunFiles(self, run, files, **_):
        urls = [dict(name=name, uploadUrl=f"{self.url}/upload/{run}/{name}") for name in files]
        return {"createRunFiles": dict(runID=run, uploadHeaders=[], files=urls)}

    def Viewer(self):
        teams = dict(edges=[])
        return {
            "viewer": dict(id="v", entity="team", username="me", email="", flags="{}", teams=teams)
        }

    def GetDefaultEntity(self):
        return self.Viewer()

    def Runs(self, project, **_):
        edges = []
        for name, run in self.runs.items():
            node = dict(
                id=name,
                name=name,
                displayName=name,
                state="finished" if run["exit"] == 0 else run["state"],
                config=json.dumps(run["config"]),
                projectId="1",
                tags=[],
                createdAt="2026-01-01T00:00:00",
                readOnly=False,
                historyLineCount=len(run["history"]),
                summaryMetrics="{}",
                systemMetrics="{}",
            )
            edges.append(dict(node=node, cursor=name))
        pages = dict(endCursor=None, hasNextPage=False)
        runs = dict(edges=edges, pageInfo=pages)
        return {"project": dict(internalId="1", runCount=len(edges), readOnly=False, runs=runs)}

    def RunFullHistory(self, name, **_):
        return {"project": dict(run=dict(history=self.runs[name]["history"]))}

    def UpsertSweep(self, config, projectName, **_):
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = dict(config=yaml.safe_load(config), runs=[])
        project = dict(id=projectName, name=projectName, entity=ENTITY)
        sweep = dict(name=name, project=project)
        return {"upsertSweep": dict(sweep=sweep, configValidationWarnings=[])}

    def SweepWithRuns(self, sweep, **_):
        config = yaml.safe_dump(self.sweeps[sweep]["config"])
        found = dict(id=sweep, name=sweep, config=config, runs=dict(edges=[]))
        return {"project": dict(sweep=found)}

    def CreateAgent(self, sweep, **_):
        name = f"agent{len(self.agents)}"
        self.agents[name] = sweep
        return {"createAgent": dict(agent=dict(id=name))}

    def Heartbeat(self, id, runState, **_):
        """Give an agent without a run the next one, or at the grid's end the order to exit."""
        commands = []
        with self.lock:
            if not json.loads(runState):
                commands = [self.next_command(self.agents[id])]
        return {"agentHeartbeat": dict(agent=dict(id=id), commands=json.dumps(commands))}

    def next_command(self, name):
        """Return a sweep's next order: a run that was preempted, or else a new one, or the end."""
        sweep = self.sweeps[name]
        for i in range(len(sweep["runs"])):
            known = self.runs.get(f"{name}-run{i}", {})
            if known.get("state") == "preempting" and known.get("exit") != 0:
                known["state"] = "running"
                return self.resume_command(name, i)
        run = sweeps.next_run(sweep["config"], sweep["runs"])
        if run is None:
            return dict(type="exit")
        sweep["runs"].append(run)
        return self.run_command(name, len(sweep["runs"]) - 1, run)

    def resume_command(self, name, index):
        """Order a preempted run again, as W&B does: with its whole config as flags."""
        program = self.sweeps[name]["config"]["program"]
        run = f"{name}-run{index}"
        arguments = {**self.runs[run]["config"], "_wandb": dict(value={})}
        return dict(type="resume", run_id=run, program=program, args=arguments)

    def run_command(self, name, index, run):
        program = self.sweeps[name]["config"]["program"]
        return dict(type="run", run_id=f"{name}-run{index}", program=program, args=run.config)


ENTITY = dict(id="e", name="team")


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def read(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def answer(self, content):
        if self.owner.silent.is_set():
            self.owner.closed.wait()
            return
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.read()
        if self.path == "/graphql":
            self.answer({"data": self.graphql(json.loads(body))})
            return
        if self.path.endswith("/file_stream"):
            run = self.owner.runs[self.path.split("/")[-2]]
            self.take(run, json.loads(body))
            self.answer({"stopped": run["stopped"]})
            return
        self.answer({})

    def graphql(self, body):
        name = body.get("operationName")
        if not name:
            name = re.search(r"(?:query|mutation)\s+(\w*)", body["query"])[1]
        operation = getattr(self.owner, name, None)
        answer = operation and operation(**body.get("variables") or {})
        if name == "Heartbeat":
            for command in json.loads(answer["agentHeartbeat"]["commands"]):
                if command["type"] == "stop":
                    self.owner.runs[command["run_id"]]["stopped"] = True
        return answer

    def take(self, run, body):
        """Keep the rows of a run's history, its state and its end."""
        if self.owner.silent.is_set():
            return
        lines = body.get("files", {}).get("wandb-history.jsonl")
        if lines:
            run["history"][lines["offset"] :] = lines["content"]
            if self.owner.short_lived:
                self.owner.silent.set()
        if body.get("preempting"):
            run["state"] = "preempting"
        if body.get("complete"):
            run["exit"] = body.get("exitcode")

    def do_PUT(self):
        self.read()
        self.answer({})

    def do_GET(self):
        self.answer({})
