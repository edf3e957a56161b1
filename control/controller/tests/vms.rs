//! From an upload to a console, with an agent that speaks the real protocol.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of tests may panic as tests do"
)]

mod support;

use bytes::Bytes;
use controller::SubmitOptions;
use futures_util::stream;
use http_body_util::BodyExt as _;
use model::{
    Code, Command, Digest, Order, Outcome, Refusal, Report, VmState,
    access::Quota,
    command::{CreateVm, IdempotencyKey},
    name::Reference,
    operation::OperationState,
    order::{Happening, TemplateReport, TemplateVerb, Verb, VmOrder, VmReport},
    query::{Query, View},
    template::{Blob, Boot, Content, Seed},
};
use sha2::{Digest as _, Sha256};
use support::{Cell, Host, PATIENCE, Session, facts, hello};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use uuid::Uuid;
use wire::{Down, Up, session::TICKET_HEADER};

const RUN: Uuid = Uuid::from_u128(77);
const KERNEL: &[u8] = b"a kernel";
const INITRD: &[u8] = b"an initial RAM disk";

fn blob(bytes: &[u8]) -> Blob {
    Blob {
        digest: Digest(Sha256::digest(bytes).into()),
        size_bytes: bytes.len() as u64,
    }
}

fn reference(name: &str) -> Reference {
    name.parse().unwrap()
}

fn keyed(key: &str) -> SubmitOptions {
    SubmitOptions {
        key: Some(IdempotencyKey {
            key: key.to_owned(),
            body_hash: [1; 32],
        }),
        ..SubmitOptions::default()
    }
}

fn template() -> Command {
    Command::CreateTemplate {
        name: "micro".parse().unwrap(),
        content: Content {
            boot: Boot::Direct {
                kernel: blob(KERNEL),
                initrd: blob(INITRD),
                cmdline: "console=ttyS0".to_owned(),
            },
            disk: None,
            memory_mib_min: 64,
            seed: Seed::None,
        },
    }
}

fn create() -> Command {
    Command::CreateVm(CreateVm {
        name: "web1".parse().unwrap(),
        template: reference("micro"),
        vcpus: 1,
        memory_mib: 128,
        disk_bytes: None,
        family: Default::default(),
        network: None,
        host: None,
        pool: None,
        start: true,
        hostname: None,
        ssh_keys: vec![],
        user_data: None,
        security_groups: vec![],
        allow_addresses: vec![],
    })
}

async fn upload(cell: &Cell, bytes: &'static [u8]) {
    let Blob { digest, size_bytes } = blob(bytes);
    let pieces = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(bytes))]);
    cell.handle
        .put_blob(&cell.admin(), digest, size_bytes, pieces)
        .await
        .unwrap();
}

fn running(order: &VmOrder) -> Report {
    Report::Vm(Box::new(VmReport {
        vm: order.vm,
        generation: order.generation,
        revision: order.revision,
        operation: Some(order.operation),
        what: Happening::Running,
    }))
}

/// A host with a template, and an order to start `web1` that it has not answered; the next report is number 3.
async fn with_an_order(cell: &Cell) -> (Host, Session, VmOrder, Outcome) {
    let host = cell.join("h1").await;
    let mut session = host.session(cell, RUN).await;
    session.report(1, facts(1, 1)).await;
    session.acknowledged(1).await;
    upload(cell, KERNEL).await;
    upload(cell, INITRD).await;
    cell.handle
        .submit(cell.admin(), template(), SubmitOptions::default())
        .await
        .unwrap();
    let Order::Template(order) = session.order().await else {
        panic!()
    };
    let TemplateVerb::Fetch { content } = order.verb else {
        panic!()
    };
    for (wanted, bytes) in content.blobs().zip([KERNEL, INITRD]) {
        let (status, body) = session.link.get(&format!("/agent/v1/blobs/{}", wanted.digest)).await;
        assert!(status == 200 && body == bytes);
    }
    let fetched = TemplateReport {
        operation: order.operation,
        template: order.template,
        pool: order.pool,
        refused: None,
        content: Some(Box::new(content)),
    };
    session.report(2, Report::Template(fetched)).await;
    session.acknowledged(2).await;
    let outcome = cell.handle.submit(cell.admin(), create(), keyed("once")).await.unwrap();
    let Order::Vm(order) = session.order().await else {
        panic!()
    };
    assert!(matches!(order.verb, Verb::Start { .. }));
    (host, session, *order, outcome)
}

async fn state(cell: &Cell) -> VmState {
    match cell
        .handle
        .read(cell.admin(), Query::Vm(reference("web1")))
        .await
        .unwrap()
    {
        View::Vm(view) => view.status.state,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_agent_fetches_only_blobs_that_a_template_names() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    upload(&cell, KERNEL).await;
    let link = host.connect(cell.agents_address()).await;
    for path in [
        blob(KERNEL).digest.to_string(),
        "0".repeat(64),
        "%2e%2e%2fadmin.token".to_owned(),
        "x".to_owned(),
    ] {
        let (status, _) = link.get(&format!("/agent/v1/blobs/{path}")).await;
        assert_eq!(status, 404, "{path}");
    }
    let refusal = cell
        .handle
        .submit(cell.admin(), template(), SubmitOptions::default())
        .await
        .unwrap_err();
    assert!(
        refusal.code == Code::InvalidInput && refusal.message.contains("not uploaded"),
        "{refusal}"
    );
}

#[tokio::test]
async fn a_host_brings_what_a_disk_became_while_it_imports_alone_and_a_fetch_goes_on_after_a_cut() {
    const BECAME: &[u8] = b"what the disk became";
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let mut session = host.session(&cell, RUN).await;
    session.report(1, facts(1, 1)).await;
    session.acknowledged(1).await;
    let brought = format!("/agent/v1/blobs/{}", blob(BECAME).digest);
    let (status, _) = session.link.ask("PUT", &brought, None, Some(BECAME)).await;
    assert_eq!(status, 403, "it imports nothing");
    upload(&cell, KERNEL).await;
    upload(&cell, INITRD).await;
    let import = cell.handle.submit(cell.admin(), template(), SubmitOptions::default());
    import.await.unwrap();
    let Order::Template(order) = session.order().await else {
        panic!()
    };
    let (status, _) = session.link.ask("PUT", &brought, None, Some(b"something else")).await;
    assert!(status.is_client_error(), "{status}");
    let (status, _) = session.link.ask("PUT", &brought, None, Some(BECAME)).await;
    assert_eq!(status, 204);
    assert!(cell.state().blobs().join(blob(BECAME).digest.to_string()).is_file());
    // Nobody fetches it before the template names it; of what is named, a part.
    assert_eq!(session.link.get(&brought).await.0, 404);
    let kernel = format!("/agent/v1/blobs/{}", blob(KERNEL).digest);
    let (status, body) = session
        .link
        .ask("GET", &kernel, Some(("range", "bytes=3-")), None)
        .await;
    assert!(status == 206 && body == KERNEL[3..], "{status}");
    for range in [
        "bytes=-3",
        "bytes=3-4",
        "items=3-",
        "bytes=x-",
        "bytes=99999999999999999999-",
        "bytes=100000-",
    ] {
        let (status, _) = session.link.ask("GET", &kernel, Some(("range", range)), None).await;
        assert!(status.is_client_error(), "{range}: {status}");
    }
    let fetched = TemplateReport {
        operation: order.operation,
        template: order.template,
        pool: order.pool,
        refused: None,
        content: None,
    };
    session.report(2, Report::Template(fetched)).await;
    session.acknowledged(2).await;
    let (status, _) = session.link.ask("PUT", &brought, None, Some(BECAME)).await;
    assert_eq!(status, 403, "its import is over");
}

#[tokio::test]
async fn an_order_that_a_crash_left_unanswered_is_sent_again_and_a_repeated_request_is_the_same_one() {
    let mut cell = Cell::start().await;
    let (host, session, order, outcome) = with_an_order(&cell).await;
    session.cut();
    cell.crash().await;
    let again = cell.handle.submit(cell.admin(), create(), keyed("once")).await.unwrap();
    let (Outcome::Operation(first), Outcome::Operation(second)) = (outcome, again) else {
        panic!()
    };
    assert_eq!(first.id, second.id);
    let mut session = host
        .connect(cell.agents_address())
        .await
        .session(hello(RUN, 2))
        .await
        .unwrap();
    let Order::Vm(sent_again) = session.order().await else {
        panic!()
    };
    assert_eq!(*sent_again, order);
    assert_eq!(state(&cell).await, VmState::Provisioning);
    session.report(3, running(&order)).await;
    session.acknowledged(3).await;
    assert_eq!(state(&cell).await, VmState::Active);
    let View::Operation(view) = cell
        .handle
        .read(cell.admin(), Query::Operation(first.id))
        .await
        .unwrap()
    else {
        panic!()
    };
    assert_eq!(view.operation.state, OperationState::Succeeded);
    let metrics = cell.handle.metrics(&cell.admin());
    for line in [
        "godwit_vms{state=\"active\"} 1",
        "godwit_hosts{state=\"up\"} 1",
        "godwit_operations_total{kind=\"create-vm\",result=\"succeeded\"} 1",
        "godwit_agents_connected 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[tokio::test]
async fn a_consoles_bytes_go_both_ways_and_its_ticket_opens_once() {
    let cell = Cell::start().await;
    let (_host, mut session, order, _) = with_an_order(&cell).await;
    session.report(3, running(&order)).await;
    session.acknowledged(3).await;
    let (handle, admin) = (cell.handle.clone(), cell.admin());
    let person = tokio::spawn(async move { handle.console(admin, reference("web1")).await });
    let (path, ticket) = match session.next().await {
        Some(Down::OpenConsole {
            console, vm, ticket, ..
        }) => {
            assert_eq!(vm, order.vm);
            (format!("{}/{console}", wire::session::CONSOLE_PATH), ticket)
        }
        other => panic!("{other:?}"),
    };
    let header = Some((TICKET_HEADER, ticket.expose()));
    let (printed, response) = session.link.post(&path, header, None).await;
    assert_eq!(response.status(), 200);
    let mut typed = response.into_body();
    let mut person = person.await.unwrap().unwrap();
    printed.send(Bytes::from_static(b"login: ")).await.unwrap();
    let mut seen = [0; 7];
    person.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"login: ");
    person.write_all(b"root\n").await.unwrap();
    let piece = tokio::time::timeout(PATIENCE, typed.frame())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(piece.into_data().unwrap(), "root\n");
    let (_, again) = session.link.post(&path, header, None).await;
    assert_eq!(again.status(), 403);
    // The guest's end is the person's end, and the other way round.
    drop(printed);
    assert_eq!(
        tokio::time::timeout(PATIENCE, person.read(&mut seen))
            .await
            .unwrap()
            .unwrap(),
        0
    );
    drop(person);
    while let Some(Ok(frame)) = tokio::time::timeout(PATIENCE, typed.frame()).await.unwrap() {
        assert!(frame.into_data().unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_console_that_cannot_be_says_why_at_once() {
    let cell = Cell::start().await;
    let refusal = cell.handle.console(cell.admin(), reference("web1")).await.unwrap_err();
    assert_eq!(refusal.code, Code::NotFound);
    let (_host, mut session, order, _) = with_an_order(&cell).await;
    session.report(3, running(&order)).await;
    session.acknowledged(3).await;
    let mut viewer = cell.admin();
    viewer.role = model::Role::Viewer;
    let refusal = cell.handle.console(viewer, reference("web1")).await.unwrap_err();
    assert_eq!(refusal.code, Code::Forbidden);
    let (handle, admin) = (cell.handle.clone(), cell.admin());
    let person = tokio::spawn(async move { handle.console(admin, reference("web1")).await });
    let Some(Down::OpenConsole { console, .. }) = session.next().await else {
        panic!()
    };
    let reason = Refusal::new(Code::HostFailed, "the console's socket is gone");
    let refused = Up::ConsoleRefused {
        console,
        reason: reason.clone(),
    };
    session.send(&refused).await;
    assert_eq!(person.await.unwrap().unwrap_err(), reason);
    session.cut();
    let unreachable = async {
        loop {
            // The cut is noticed as soon as its end arrives.
            match cell.handle.console(cell.admin(), reference("web1")).await {
                Err(refusal) if refusal.code == Code::HostUnreachable => return,
                other => assert!(other.is_err()),
            }
        }
    };
    tokio::time::timeout(PATIENCE, unreachable).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_requests_at_once_at_the_edge_of_the_quota_exactly_the_quota_succeeds() {
    const ASKED: usize = 24;
    const ROOM: u64 = 5;
    let cell = Cell::start().await;
    let (_host, _session, _, _) = with_an_order(&cell).await;
    let quota = Command::SetQuota {
        project: reference("default"),
        quota: Quota {
            vms: Some(1 + ROOM),
            ..Quota::default()
        },
    };
    cell.handle
        .submit(cell.admin(), quota, SubmitOptions::default())
        .await
        .unwrap();
    let tasks: Vec<_> = (0..ASKED)
        .map(|n| {
            let (handle, admin) = (cell.handle.clone(), cell.admin());
            tokio::spawn(async move {
                let Command::CreateVm(wanted) = create() else { panic!() };
                let wanted = CreateVm {
                    name: format!("race{n}").parse().unwrap(),
                    start: false,
                    ..wanted
                };
                handle
                    .submit(admin, Command::CreateVm(wanted), SubmitOptions::default())
                    .await
            })
        })
        .collect();
    let mut succeeded = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => succeeded += 1,
            Err(refusal) => assert_eq!(refusal.code, Code::QuotaExceeded, "{refusal}"),
        }
    }
    assert_eq!(succeeded, ROOM);
    let View::Project(project) = cell
        .handle
        .read(cell.admin(), Query::Project(reference("default")))
        .await
        .unwrap()
    else {
        panic!()
    };
    assert_eq!(project.used.vms, 1 + ROOM);
}
