"""A stand-in for W&B's server on this machine: as much of its protocol as runs, sweeps and agents need. It keeps what
they send, and hands out a sweep's runs as W&B's own engine expands its grid."""

import gzip
import http.server
import json
import re
import threading

import sweeps
import yaml


class Server:
    """As a context manager, listens on a port of its own; `runs` maps a run's id to its config, history and state, and
    `sweeps` a sweep's to its config and the runs that were handed out."""

    def __init__(self):
        self.runs, self.sweeps, self.agents, self.lock = {}, {}, {}, threading.Lock()
        handler = type("Handler", (Handler,), {"owner": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def history(self, run):
        return [json.loads(line) for line in self.runs[run]["history"]]

    # Answers to the operations of W&B's GraphQL, by their names

    def RunResumeStatus(self, name, project, **_):
        run = self.runs.get(name)
        if run is None or not run["started"]:
            return {"model": None}
        tail = run["history"][-1:]
        bucket = dict(
            id=name, name=name, displayName=name, config=json.dumps(run["config"]), tags=[], notes="",
            historyLineCount=len(run["history"]), historyTail=json.dumps(tail), summaryMetrics="".join(tail) or "{}",
            eventsLineCount=0, eventsTail="[]", logLineCount=0, wandbConfig=json.dumps({"t": 1}),
        )  # fmt: skip
        return {"model": dict(id=project, name=project, entity=dict(id="e", name="team"), bucket=bucket)}

    def UpsertBucket(self, name=None, config=None, state=None, project="", sweep=None, **rest):
        known = name in self.runs
        run = self.runs.setdefault(name, dict(config={}, history=[], state=None, exit=None, started=False))
        run["started"] |= config is not None
        run["config"] |= json.loads(config or "{}")
        run["state"], run["sweep"] = state or run["state"], sweep or run.get("sweep")
        bucket = dict(
            id=name, name=name, displayName=rest.get("displayName") or name, description="", sweepName=sweep,
            config=json.dumps(run["config"]), historyLineCount=len(run["history"]),
            project=dict(id=project, name=project, entity=dict(id="e", name="team")),
        )  # fmt: skip
        return {"upsertBucket": dict(bucket=bucket, inserted=not known)}

    def CreateRunFiles(self, run, files, **_):
        files = [dict(name=name, uploadUrl=f"{self.url}/upload/{run}/{name}") for name in files]
        return {"createRunFiles": dict(runID=run, uploadHeaders=[], files=files)}

    def Viewer(self):
        return {"viewer": dict(id="v", entity="team", username="me", email="", flags="{}", teams=dict(edges=[]))}

    def GetDefaultEntity(self):
        return self.Viewer()

    def Runs(self, project, **_):
        nodes = [dict(
            id=name, name=name, displayName=name, state="finished" if run["exit"] == 0 else run["state"],
            config=json.dumps(run["config"]), projectId="1", tags=[], createdAt="2026-01-01T00:00:00", readOnly=False,
            historyLineCount=len(run["history"]), summaryMetrics="{}", systemMetrics="{}",
        ) for name, run in self.runs.items()]  # fmt: skip
        edges = [dict(node=node, cursor=node["id"]) for node in nodes]
        pages = dict(endCursor=None, hasNextPage=False)
        runs = dict(edges=edges, pageInfo=pages)
        return {"project": dict(internalId="1", runCount=len(nodes), readOnly=False, runs=runs)}

    def RunFullHistory(self, name, **_):
        return {"project": dict(run=dict(history=self.runs[name]["history"]))}

    def UpsertSweep(self, config, projectName, **_):
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = dict(config=yaml.safe_load(config), runs=[])
        project = dict(id=projectName, name=projectName, entity=dict(id="e", name="team"))
        return {"upsertSweep": dict(sweep=dict(name=name, project=project), configValidationWarnings=[])}

    def SweepWithRuns(self, sweep, **_):
        found = dict(id=sweep, name=sweep, config=yaml.safe_dump(self.sweeps[sweep]["config"]), runs=dict(edges=[]))
        return {"project": dict(sweep=found)}

    def CreateAgent(self, sweep, **_):
        self.agents[f"agent{len(self.agents)}"] = sweep
        return {"createAgent": dict(agent=dict(id=f"agent{len(self.agents) - 1}"))}

    def Heartbeat(self, id, runState, **_):
        """When the agent has no run, one that was preempted, or else a new one; at the grid's end the order to exit."""
        commands, sweep = [], self.sweeps[self.agents[id]]
        with self.lock:
            if not json.loads(runState):
                names = [f"{self.agents[id]}-run{i}" for i in range(len(sweep["runs"]) + 1)]
                preempted = [name for name in names[:-1] if self.runs.get(name, {}).get("state") == "preempting"]
                if preempted:
                    self.runs[preempted[0]]["state"] = "running"
                elif run := sweeps.next_run(sweep["config"], sweep["runs"]):
                    sweep["runs"].append(run)
                if preempted or run:
                    name = (preempted or names[-1:])[0]
                    config = sweep["runs"][names.index(name)].config
                    commands = [dict(type="run", run_id=name, program=sweep["config"]["program"], args=config)]
                else:
                    commands = [dict(type="exit")]
        return {"agentHeartbeat": dict(agent=dict(id=id), commands=json.dumps(commands))}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def read(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.read()
        if self.path == "/graphql":
            body = json.loads(body)
            name = body.get("operationName") or re.search(r"(?:query|mutation)\s+(\w*)", body["query"])[1]
            operation = getattr(self.owner, name, lambda **_: None)
            return self.answer({"data": operation(**body.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            body = json.loads(body)
            run = self.owner.runs[self.path.split("/")[-2]]
            if lines := body.get("files", {}).get("wandb-history.jsonl"):
                run["history"][lines["offset"] :] = lines["content"]
            run["state"] = "preempting" if body.get("preempting") else run["state"]
            if body.get("complete"):
                run["exit"] = body.get("exitcode")
        self.answer({})

    def do_PUT(self):
        self.read()
        self.answer({})

    def do_GET(self):
        self.answer({})
