//! Joining: one token, one host; and the files of a first start.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of tests may panic as tests do"
)]

mod support;

use std::os::unix::fs::PermissionsExt as _;

use controller::{ClientFile, Controller, StartError};
use futures_util::future::join_all;
use identity::{ApiToken, JoinToken, NodeKey};
use model::{Code, Millis};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use support::{Cell, Host, config, hello, join_request};
use uuid::Uuid;

#[tokio::test]
async fn of_hosts_that_race_for_one_token_exactly_one_joins() {
    let cell = Cell::start().await;
    let token = cell.join_token().await;
    let keys: Vec<NodeKey> = (0..8).map(|_| NodeKey::generate().unwrap()).collect();
    let requests = keys.iter().map(|key| join_request(&token, key, "h1"));
    let answers = join_all(requests.map(|request| cell.handle.join(request))).await;
    let joined: Vec<_> = answers.iter().flatten().collect();
    assert_eq!(joined.len(), 1);
    assert!(
        answers
            .iter()
            .filter_map(|answer| answer.as_ref().err())
            .all(|e| e.code == Code::Unauthenticated)
    );
    let winner = answers.iter().position(Result::is_ok).unwrap();
    let key = keys.into_iter().nth(winner).unwrap();
    let host = Host::new(key, joined[0]);
    assert_eq!(joined[0].agent_endpoint, cell.agents_address().to_string());
    let session = host
        .connect(cell.agents_address())
        .await
        .session(hello(Uuid::nil(), 0))
        .await;
    assert!(session.is_ok());
}

#[tokio::test]
async fn a_wrong_token_or_signing_request_joins_nobody_and_spends_nothing() {
    let cell = Cell::start().await;
    let token = cell.join_token().await;
    let key = NodeKey::generate().unwrap();
    let known: JoinToken = token.parse().unwrap();
    let forged = JoinToken::generate(known.id(), known.authority()).unwrap();
    let unknown = JoinToken::generate(Uuid::nil(), known.authority()).unwrap();
    for wrong in [forged.reveal(), unknown.reveal(), "gwj1.x".to_owned(), String::new()] {
        let refusal = cell.handle.join(join_request(&wrong, &key, "h1")).await.unwrap_err();
        assert_eq!(refusal.code, Code::Unauthenticated);
        assert!(!refusal.message.contains(&wrong) || wrong.is_empty());
    }
    let mut unsigned = key.request().unwrap();
    *unsigned.last_mut().unwrap() ^= 1;
    for csr_pem in [
        String::new(),
        "x".repeat(1 << 20),
        identity::pem("CERTIFICATE REQUEST", &unsigned),
        identity::pem("CERTIFICATE REQUEST", b"x"),
    ] {
        let mut request = join_request(&token, &key, "h1");
        request.csr_pem = csr_pem;
        assert_eq!(cell.handle.join(request).await.unwrap_err().code, Code::InvalidInput);
    }
    assert!(cell.handle.join(join_request(&token, &key, "h1")).await.is_ok());
    let mut viewer = cell.admin();
    viewer.role = model::Role::Viewer;
    let refusal = cell
        .handle
        .add_join_token(viewer, Millis::seconds(60))
        .await
        .unwrap_err();
    assert_eq!(refusal.code, Code::Forbidden);
}

#[tokio::test]
async fn a_host_renews_its_certificate_over_its_own_connection() {
    let cell = Cell::start().await;
    let host = cell.join("h1").await;
    let link = host.connect(cell.agents_address()).await;
    let key = NodeKey::generate().unwrap();
    let csr_pem = identity::pem("CERTIFICATE REQUEST", &key.request().unwrap());
    let body = serde_json::to_vec(&wire::RenewRequest { csr_pem }).unwrap();
    let (status, body) = link.post_whole(wire::session::RENEW_PATH, None, body.into()).await;
    assert_eq!(status, 200, "{body:?}");
    let response: wire::RenewResponse = serde_json::from_slice(&body).unwrap();
    let certificate = CertificateDer::from_pem_slice(response.certificate_pem.as_bytes()).unwrap();
    let authority = host.identity.authority().clone();
    let renewed = identity::NodeIdentity::new(key, certificate.to_vec(), authority).unwrap();
    assert_eq!(renewed.peer().role, identity::Role::Host(host.id.0));
}

#[tokio::test]
async fn the_first_start_makes_one_administrator_and_later_ones_keep_all() {
    let mut cell = Cell::start().await;
    let (admin, state) = (cell.admin(), cell.state());
    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(state.admin_token()), 0o600);
    let token = std::fs::read(state.admin_token()).unwrap();
    let authority = std::fs::read(state.ca_certificate()).unwrap();
    cell.crash().await;
    assert_eq!(std::fs::read(state.admin_token()).unwrap(), token);
    assert_eq!(std::fs::read(state.ca_certificate()).unwrap(), authority);
    assert_eq!(cell.admin(), admin);
    let client: ClientFile = serde_json::from_slice(&std::fs::read(state.client()).unwrap()).unwrap();
    assert_eq!(client.server, format!("https://{}", cell.controller().api_address()));
    let stranger = ApiToken::generate().unwrap().reveal();
    for wrong in [stranger.as_str(), "", "gw1_", "Bearer x"] {
        assert_eq!(cell.handle.authenticate(wrong).unwrap_err().code, Code::Unauthenticated);
    }
}

#[tokio::test]
async fn the_embedded_store_serves_and_survives_a_restart_and_is_used_by_one_process_only() {
    let directory = tempfile::tempdir().unwrap();
    let (controller, handle) = Controller::start(config(directory.path())).await.unwrap();
    let token = std::fs::read_to_string(directory.path().join("admin.token")).unwrap();
    let admin = handle.authenticate(token.trim()).unwrap();
    let text = handle
        .add_join_token(admin.clone(), Millis::seconds(3600))
        .await
        .unwrap();
    let key = NodeKey::generate().unwrap();
    let host = handle.join(join_request(&text, &key, "h1")).await.unwrap().host;
    assert!(matches!(
        Controller::start(config(directory.path())).await,
        Err(StartError::Open(store::OpenError::InUse { .. }))
    ));
    controller.stop().await;
    drop(handle);

    let (controller, handle) = Controller::start(config(directory.path())).await.unwrap();
    let admin_again = handle.authenticate(token.trim()).unwrap();
    assert_eq!(admin_again, admin);
    let reference = model::name::Reference::Id(host.0);
    let command = model::Command::RemoveHost(reference);
    // Notices are numbered on after those of the process before: the store refuses a number twice.
    handle.submit(admin, command, Default::default()).await.unwrap();
    controller.stop().await;
}

#[tokio::test]
async fn a_configuration_that_cannot_be_is_refused_before_anything_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let good = config(&directory.path().join("state"));
    let mut bad = vec![good.clone(); 5];
    bad[0].names.clear();
    bad[1].network.prefix = 33;
    bad[2].network.address = "10.91.0.1".parse().unwrap();
    bad[3].network.last = "10.92.0.1".parse().unwrap();
    bad[4].network.gateway = Some(good.network.first);
    for config in bad {
        let refused = Controller::start_with(config, support::Faulty::new()).await;
        assert!(matches!(refused, Err(StartError::Config(_))));
    }
    assert!(!good.state.exists());
}
