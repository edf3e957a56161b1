//! Every endpoint, asked by everybody. An endpoint that is not in the table fails the build: whoever adds one says here who may use it.

#![allow(clippy::unwrap_used)] // a test fails by panicking, its helpers too

mod support;

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{Request, StatusCode, header},
};
use controller::{Memory, Storage};
use model::{
    Change, Millis, Operation, OperationId, OperationKind, OperationState, ProjectId, Row, SecurityGroup,
    SecurityGroupId, Template, TemplateId, Timestamp, TokenId, Vm, VmId, VmSpec, VmState, VmStatus,
    host::Accelerator,
    id::{Generation, Revision},
    layout::{Family, Layout},
    operation::{Target, TargetKind},
    template::{Boot, Content, Seed, TemplateState},
    vm::Power,
};
use serde_json::{Value, json};
use support::{Api, document};
use uuid::Uuid;

/// Who may use an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// Everybody, without a token; each is here for a reason.
    Open,
    /// Who has this role, or a higher one: 0 viewer, 1 operator, 2 project admin, 3 cloud admin.
    From(usize),
}

/// What a path's parameter stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thing {
    /// Nothing, or something that belongs to the cell.
    Cell,
    /// Something of a project: others are told that it is not there.
    OfProject,
}

use Thing::{Cell, OfProject};
use Who::{From, Open};

const ROLES: [&str; 4] = ["viewer", "operator", "project-admin", "cloud-admin"];

const VM: &str = r#"{"name":"new","template":"t"}"#;
const QUOTA: &str = r#"{"vms":9}"#;

/// Method, path, who, what, body. Those that take things away come last.
const TABLE: &[(&str, &str, Who, Thing, &str)] = &[
    // A host that joins shows its join token; who logs in, a password; the others tell nothing of the cell.
    ("post", "/v1/join", Open, Cell, "{}"),
    ("post", "/v1/login", Open, Cell, r#"{"user":"x","password":"y"}"#),
    ("get", "/healthz", Open, Cell, ""),
    ("get", "/v1/openapi.json", Open, Cell, ""),
    ("get", "/metrics", From(0), Cell, ""),
    ("get", "/v1/whoami", From(0), Cell, ""),
    ("get", "/v1/events?follow=false", From(0), Cell, ""),
    ("get", "/v1/hosts", From(0), Cell, ""),
    ("get", "/v1/hosts/{host}", From(0), Cell, ""),
    ("get", "/v1/pools", From(0), Cell, ""),
    ("get", "/v1/vms", From(0), Cell, ""),
    ("get", "/v1/vms/{vm}", From(0), OfProject, ""),
    ("get", "/v1/metrics/vms", From(0), Cell, ""),
    ("get", "/v1/metrics/vms/{vm}", From(0), OfProject, ""),
    ("get", "/v1/templates", From(0), Cell, ""),
    ("get", "/v1/templates/{template}", From(0), OfProject, ""),
    ("get", "/v1/operations", From(0), Cell, ""),
    ("get", "/v1/operations/{operation}", From(0), OfProject, ""),
    (
        "get",
        "/v1/operations/{operation}/wait?timeout_s=0",
        From(0),
        OfProject,
        "",
    ),
    ("get", "/v1/networks", From(0), Cell, ""),
    ("get", "/v1/volumes", From(0), Cell, ""),
    ("get", "/v1/ports", From(0), Cell, ""),
    ("get", "/v1/ports/{port}", From(0), OfProject, ""),
    ("get", "/v1/security-groups", From(0), Cell, ""),
    ("get", "/v1/security-groups/{group}", From(0), OfProject, ""),
    ("head", "/v1/blobs/{sha256}?size_bytes=1", From(0), Cell, ""),
    ("get", "/v1/projects", From(0), Cell, ""),
    ("get", "/v1/projects/{project}", From(0), OfProject, ""),
    // Itself, which a token without a user is not.
    ("get", "/v1/users/{user}", From(2), Cell, ""),
    ("get", "/v1/vms/{vm}/console", From(1), OfProject, ""),
    ("post", "/v1/vms/{vm}/start", From(1), OfProject, ""),
    ("post", "/v1/vms/{vm}/stop", From(1), OfProject, ""),
    ("post", "/v1/vms/{vm}/kill", From(1), OfProject, ""),
    ("post", "/v1/vms/{vm}/reboot", From(1), OfProject, ""),
    ("post", "/v1/vms/{vm}/pause", From(1), OfProject, ""),
    ("post", "/v1/vms/{vm}/resume", From(1), OfProject, ""),
    ("post", "/v1/vms/{vm}/migrate", From(1), OfProject, ""),
    ("post", "/v1/operations/{operation}/cancel", From(1), OfProject, ""),
    ("post", "/v1/vms", From(2), Cell, VM),
    ("put", "/v1/blobs/{sha256}", From(2), Cell, "blob"),
    (
        "post",
        "/v1/templates",
        From(2),
        Cell,
        r#"{"name":"u","content":{"boot":{"kind":"bios"},"disk":null,"memory_mib_min":64}}"#,
    ),
    (
        "put",
        "/v1/networks/{network}/addressing",
        From(2),
        Cell,
        r#"{"method":"dhcp"}"#,
    ),
    ("patch", "/v1/ports/{port}", From(2), OfProject, r#"{"link_down":true}"#),
    ("post", "/v1/security-groups", From(2), Cell, r#"{"name":"new"}"#),
    (
        "post",
        "/v1/security-groups/{group}/rules",
        From(2),
        OfProject,
        r#"{"direction":"ingress"}"#,
    ),
    (
        "delete",
        "/v1/security-groups/{group}/rules/{number}",
        From(2),
        OfProject,
        "",
    ),
    ("get", "/v1/users", From(2), Cell, ""),
    ("post", "/v1/users/{user}/grant", From(2), Cell, r#"{"role":"viewer"}"#),
    ("get", "/v1/tokens", From(2), Cell, ""),
    ("post", "/v1/tokens", From(2), Cell, r#"{"name":"new","role":"viewer"}"#),
    ("get", "/v1/audit", From(2), Cell, ""),
    // They tell of what all projects do.
    ("get", "/v1/metrics/hosts", From(3), Cell, ""),
    ("get", "/v1/metrics/hosts/{host}", From(3), Cell, ""),
    ("post", "/v1/hosts/tokens", From(3), Cell, "{}"),
    ("patch", "/v1/hosts/{host}", From(3), Cell, r#"{"schedulable":true}"#),
    ("post", "/v1/projects", From(3), Cell, r#"{"name":"new"}"#),
    ("put", "/v1/projects/{project}/quota", From(3), Cell, QUOTA),
    (
        "post",
        "/v1/users",
        From(3),
        Cell,
        r#"{"name":"new","password":"long enough"}"#,
    ),
    // One's own needs the present password, which a token without a user does not have.
    (
        "post",
        "/v1/users/{user}/password",
        From(3),
        Cell,
        r#"{"password":"long enough"}"#,
    ),
    ("patch", "/v1/users/{user}", From(3), Cell, r#"{"disabled":false}"#),
    ("post", "/v1/users/{user}/revoke", From(2), Cell, "{}"),
    ("delete", "/v1/users/{user}", From(3), Cell, ""),
    (
        "post",
        "/v1/hosts/{host}/abandon",
        From(3),
        Cell,
        r#"{"machine_is_off":true}"#,
    ),
    ("delete", "/v1/hosts/{host}", From(3), Cell, ""),
    ("delete", "/v1/tokens/{token}", From(2), OfProject, ""),
    ("delete", "/v1/security-groups/{group}", From(2), OfProject, ""),
    ("delete", "/v1/vms/{vm}", From(2), OfProject, ""),
    ("delete", "/v1/templates/{template}", From(2), OfProject, ""),
    ("post", "/v1/logout", From(0), Cell, ""),
    ("delete", "/v1/projects/{project}", From(3), Cell, ""),
];

const VM_ID: u128 = 0x0197_b2a0_0000_7000_8000_0000_0000_0001;
const TEMPLATE_ID: u128 = VM_ID + 1;
const OPERATION_ID: u128 = VM_ID + 2;
const GROUP_ID: u128 = VM_ID + 3;

fn name(text: &str) -> model::Name {
    text.parse().unwrap()
}

/// A VM that is off, what it was made from, and an operation that is over.
// tidy: long because rows have many columns.
fn things(project: ProjectId) -> Vec<Change> {
    let at = Timestamp(1_700_000_000_000);
    let (vm, template) = (VmId(Uuid::from_u128(VM_ID)), TemplateId(Uuid::from_u128(TEMPLATE_ID)));
    let content = Content {
        boot: Boot::Bios,
        disk: None,
        memory_mib_min: 64,
        seed: Seed::None,
    };
    let rows = [
        Row::SecurityGroup(Box::new(SecurityGroup {
            id: SecurityGroupId(Uuid::from_u128(GROUP_ID)),
            project,
            name: name("web"),
            rules: vec![],
            next_rule: 2,
        })),
        Row::Template(Box::new(Template {
            id: template,
            project,
            name: name("t"),
            content,
            state: TemplateState::Ready {
                pools: Vec::new(),
                fetching: Vec::new(),
            },
            created_at: at,
        })),
        Row::Vm(Box::new(Vm {
            id: vm,
            project,
            name: name("web1"),
            spec: VmSpec {
                template,
                vcpus: 1,
                memory_mib: 512,
                family: Family::Q35,
                power: Power::Off,
            },
            revision: Revision(1),
            layout: Layout {
                version: 1,
                family: Family::Q35,
                machine: "pc-q35-7.2".to_owned(),
                accelerator: Accelerator::Tcg,
                cpu: "max".to_owned(),
                vcpus: 1,
                memory_mib: 512,
                devices: Vec::new(),
                seed: None,
            },
            ports: Vec::new(),
            volumes: Vec::new(),
            status: VmStatus {
                state: VmState::Inactive,
                since: at,
                reason: None,
                host: None,
                generation: Generation(0),
                highest: Generation(0),
                ordered: Revision(0),
                observed: Revision(0),
                moving: None,
                cleared: BTreeSet::new(),
            },
            operation: None,
            created_at: at,
        })),
        Row::Operation(Box::new(Operation {
            id: OperationId(Uuid::from_u128(OPERATION_ID)),
            project,
            subject: "admin".to_owned(),
            kind: OperationKind::StopVm,
            target: Target {
                kind: TargetKind::Vm,
                id: vm.0,
                name: name("web1"),
            },
            state: OperationState::Succeeded,
            created_at: at,
            finished_at: Some(at),
            ends_by: at.after(Millis(1)),
        })),
    ];
    rows.into_iter().map(Change::Put).collect()
}

/// A cell with projects `team-a` and `team-b`, things in the first, a user, and a token to be ended.
struct Setup {
    api: Api,
    project: String,
    user: String,
    victim: String,
    made: usize,
}

impl Setup {
    async fn start() -> Self {
        let storage = Arc::new(Memory::default());
        let api = Api::over(storage.clone(), tempfile::tempdir().unwrap()).await;
        let (status, project) = api.post("/v1/projects", r#"{"name":"team-a"}"#).await;
        assert_eq!(status, StatusCode::CREATED, "{project}");
        assert_eq!(
            api.post("/v1/projects", r#"{"name":"team-b"}"#).await.0,
            StatusCode::CREATED
        );
        let id: ProjectId = project["id"].as_str().unwrap().parse().unwrap();
        let state = api.stop().await;
        storage.commit(things(id)).await.unwrap();
        let api = Api::over(storage, state).await;
        let user = json!({ "name": "alice", "password": "correct horse" }).to_string();
        let (status, user) = api.post("/v1/users", user).await;
        assert_eq!(status, StatusCode::CREATED, "{user}");
        let mut cell = Self {
            api,
            project: id.to_string(),
            user: user["id"].as_str().unwrap().to_owned(),
            victim: String::new(),
            made: 0,
        };
        // The user is known in both projects: what keeps others away is their role alone.
        for project in ["team-a", "team-b"] {
            let path = format!("/v1/users/{}/grant", cell.user);
            let token = cell.api.token.clone();
            let granted = cell
                .ask("post", &path, r#"{"role":"viewer"}"#, Some(&token), Some(project))
                .await;
            assert_eq!(granted.0, StatusCode::NO_CONTENT);
        }
        cell.victim = cell.token("viewer", "team-a", None).await.0;
        cell
    }

    /// A fresh token: its id and text.
    async fn token(&mut self, role: &str, project: &str, ttl_s: Option<u32>) -> (String, String) {
        self.made += 1;
        let body = json!({ "name": format!("t{}", self.made), "role": role, "ttl_s": ttl_s }).to_string();
        let root = self.api.token.clone();
        let (status, made) = self.ask("post", "/v1/tokens", &body, Some(&root), Some(project)).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        (
            made["id"].as_str().unwrap().to_owned(),
            made["token"].as_str().unwrap().to_owned(),
        )
    }

    /// Fills a path's parameters with what is there, in `team-a`.
    fn filled(&self, path: &str) -> String {
        let id = |id: u128| Uuid::from_u128(id).to_string();
        path.replace("{vm}", &id(VM_ID))
            .replace("{template}", &id(TEMPLATE_ID))
            .replace("{operation}", &id(OPERATION_ID))
            // A port can be named by its VM.
            .replace("{port}", &id(VM_ID))
            .replace("{group}", &id(GROUP_ID))
            .replace("{number}", "1")
            .replace("{project}", &self.project)
            .replace("{user}", &self.user)
            .replace("{token}", &self.victim)
            .replace("{host}", "h1")
            .replace("{network}", "default")
            .replace("{sha256}", &"0".repeat(64))
    }

    async fn ask(
        &self,
        method: &str,
        path: &str,
        body: &str,
        token: Option<&str>,
        project: Option<&str>,
    ) -> (StatusCode, Value) {
        let mut request = Request::builder()
            .method(method.to_ascii_uppercase().as_str())
            .uri(self.filled(path))
            .header(header::HOST, "localhost")
            .header(header::CONTENT_LENGTH, body.len());
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(project) = project {
            request = request.header(rest::PROJECT_HEADER, project);
        }
        if path.ends_with("/console") {
            request = request
                .header(header::CONNECTION, "upgrade")
                .header(header::UPGRADE, rest::CONSOLE_PROTOCOL);
        } else if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let response = self.api.send(request.body(Body::from(body.to_owned())).unwrap()).await;
        let status = response.status();
        let bytes = http_body_util::BodyExt::collect(response.into_body())
            .await
            .unwrap()
            .to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    /// Waits until a token's time is over.
    async fn expired(&self, token: &str) {
        let until = Instant::now() + Duration::from_secs(30);
        let mut every = tokio::time::interval(Duration::from_millis(100));
        while self.ask("get", "/v1/whoami", "", Some(token), None).await.0 != StatusCode::UNAUTHORIZED {
            assert!(Instant::now() < until, "a token of one second is still valid");
            every.tick().await;
        }
    }
}

#[test]
fn every_endpoint_of_the_document_is_in_the_table() {
    let known: BTreeSet<(String, String)> = TABLE
        .iter()
        .map(|(method, path, ..)| ((*method).to_owned(), path.split('?').next().unwrap().to_owned()))
        .collect();
    assert_eq!(known.len(), TABLE.len(), "an endpoint is in the table twice");
    let mut there = BTreeSet::new();
    for (path, methods) in document()["paths"].as_object().unwrap() {
        let verbs = ["get", "put", "post", "delete", "patch", "head", "options", "trace"];
        for method in methods
            .as_object()
            .unwrap()
            .keys()
            .filter(|method| verbs.contains(&method.as_str()))
        {
            there.insert((method.clone(), path.clone()));
        }
    }
    let missing: Vec<_> = there.difference(&known).collect();
    assert!(missing.is_empty(), "say in the table who may use {missing:?}");
    let gone: Vec<_> = known.difference(&there).collect();
    assert!(gone.is_empty(), "the table has what is not there: {gone:?}");
}

#[tokio::test]
async fn no_endpoint_is_answered_without_a_token_or_with_one_that_is_over() {
    let mut cell = Setup::start().await;
    let (id, revoked) = cell.token("cloud-admin", "default", None).await;
    let root = cell.api.token.clone();
    let path = format!("/v1/tokens/{id}");
    assert_eq!(
        cell.ask("delete", &path, "", Some(&root), None).await.0,
        StatusCode::NO_CONTENT
    );
    let (_, expired) = cell.token("cloud-admin", "default", Some(1)).await;
    cell.expired(&expired).await;
    for &(method, path, who, _, body) in TABLE.iter().filter(|(_, _, who, ..)| *who != Open) {
        let From(_) = who else { continue };
        for (what, token) in [
            ("none", None),
            ("revoked", Some(&*revoked)),
            ("expired", Some(&*expired)),
        ] {
            for project in [None, Some("team-a"), Some("nowhere"), Some("..")] {
                let (status, answer) = cell.ask(method, path, body, token, project).await;
                assert_eq!(
                    status,
                    StatusCode::UNAUTHORIZED,
                    "{what} token: {method} {path}: {answer}"
                );
            }
        }
    }
}

#[tokio::test]
async fn every_endpoint_is_refused_below_its_least_role_and_in_projects_of_others() {
    let mut cell = Setup::start().await;
    let mut own = Vec::new();
    let mut others = Vec::new();
    for role in ROLES {
        own.push(cell.token(role, "team-a", None).await.1);
        others.push(cell.token(role, "team-b", None).await.1);
    }
    for &(method, path, who, thing, body) in TABLE {
        let From(least) = who else { continue };
        for role in 0..least {
            let (status, answer) = cell.ask(method, path, body, Some(&own[role]), None).await;
            let refused = matches!(status.as_u16(), 403 | 404);
            assert!(refused, "{} on {method} {path}: {status} {answer}", ROLES[role]);
        }
        for (token, role) in others.iter().zip(ROLES).take(3) {
            let (status, answer) = cell.ask(method, path, body, Some(token), Some("team-a")).await;
            assert_eq!(
                status,
                StatusCode::NOT_FOUND,
                "{role} of team-b in team-a: {method} {path}: {answer}"
            );
        }
        if thing == OfProject {
            for (token, role) in others.iter().zip(ROLES).take(3).skip(least) {
                let (status, answer) = cell.ask(method, path, body, Some(token), None).await;
                assert_eq!(
                    status,
                    StatusCode::NOT_FOUND,
                    "{role} of team-b on team-a's: {method} {path}: {answer}"
                );
            }
        }
    }
    // Nothing of that changed anything; and the least role is enough.
    for &(method, path, who, thing, body) in TABLE {
        let From(least) = who else { continue };
        let (_, token) = cell.token(ROLES[least], "team-a", None).await;
        let (status, answer) = cell.ask(method, path, body, Some(&token), Some("team-a")).await;
        let what = format!("{} on {method} {path}: {status} {answer}", ROLES[least]);
        assert!(!matches!(status.as_u16(), 401 | 403 | 405 | 500), "{what}");
        assert!(thing == Cell || status != StatusCode::NOT_FOUND, "{what}");
    }
}

#[tokio::test]
async fn nobody_is_told_more_of_a_project_of_others_than_of_one_that_is_not_there() {
    let mut cell = Setup::start().await;
    let (_, token) = cell.token("project-admin", "team-b", None).await;
    let there = cell.ask("get", "/v1/vms", "", Some(&token), Some("team-a")).await;
    let nowhere = cell.ask("get", "/v1/vms", "", Some(&token), Some("team-c")).await;
    let detail = |answer: &Value| {
        answer["detail"]
            .as_str()
            .unwrap()
            .replace("team-a", "X")
            .replace("team-c", "X")
    };
    assert_eq!((there.0, detail(&there.1)), (nowhere.0, detail(&nowhere.1)));
    let twice = cell.ask("get", "/v1/vms", "", Some(&token), Some("a b")).await;
    assert_eq!(twice.0, StatusCode::BAD_REQUEST);
    let id: TokenId = cell.victim.parse().unwrap();
    let path = format!("/v1/tokens/{id}");
    assert_eq!(
        cell.ask("delete", &path, "", Some(&token), None).await.0,
        StatusCode::NOT_FOUND
    );
}
