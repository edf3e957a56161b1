//! Arm `qemu-tuned-tls`: as `qemu-tuned`, over QEMU's own TLS with a certificate on
//! each side and the destination admitting the one source by name.

use super::qemu::{A, B, Qemu, Running, destination_uri, wall_ms};
use super::qemu_tuned::tuned;
use super::{Arm, Bench, Moved};
use anyhow::{Context, Result};
use e2e::lab::Lab;
use e2e::run::run;
use serde_json::json;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

/// See the file's first line.
#[derive(Debug, Default)]
pub struct QemuTunedTls {
    running: Running,
    /// Two channels (multifd): encryption, which takes longest here, on two cores.
    multifd: bool,
}

impl QemuTunedTls {
    /// The arm `qemu-tuned-tls-2ch`.
    pub fn two_channels() -> QemuTunedTls {
        QemuTunedTls {
            running: Running::default(),
            multifd: true,
        }
    }

    fn capabilities(&self) -> Vec<&'static str> {
        let mut names = vec!["events", "return-path"];
        names.extend(self.multifd.then_some("multifd"));
        names
    }
}

/// Where each host keeps its key, as it sees it.
const DIR: &str = "/var/lib/godwit/bench-tls";

impl Arm for QemuTunedTls {
    fn name(&self) -> &'static str {
        if self.multifd {
            "qemu-tuned-tls-2ch"
        } else {
            "qemu-tuned-tls"
        }
    }

    fn boot(&mut self, bench: &Bench<'_>) -> Result<Ipv4Addr> {
        make_certificates(bench.lab)?;
        let extra = [
            "-object".to_owned(),
            format!("tls-creds-x509,id=tls0,dir={DIR},endpoint=client,verify-peer=on"),
        ];
        self.running = Running::boot(bench, &extra)?;
        Ok(bench.guest.ip)
    }

    fn migrate(&mut self, bench: &Bench<'_>) -> Result<Moved> {
        let started_ms = wall_ms();
        let uri = destination_uri(bench.lab)?;
        let incoming = [
            "-incoming".to_owned(),
            "defer".to_owned(),
            "-object".to_owned(),
            format!("tls-creds-x509,id=tls0,dir={DIR},endpoint=server,verify-peer=on"),
            "-object".to_owned(),
            "authz-simple,id=peer0,identity=CN=bench-h1".to_owned(),
        ];
        let mut destination = Qemu::spawn(bench, B, &self.running.disk, &incoming)?;
        destination.set_capabilities(&self.capabilities())?;
        destination.set_parameters(tuned())?;
        destination.set_parameters(json!({ "tls-creds": "tls0", "tls-authz": "peer0" }))?;
        destination.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        let capabilities = self.capabilities();
        if let Some(source) = &mut self.running.source {
            source.set_capabilities(&capabilities)?;
            source.set_parameters(tuned())?;
            source.set_parameters(json!({ "tls-creds": "tls0", "tls-hostname": "bench-h2" }))?;
            source.qmp.execute("migrate", json!({ "uri": uri }))?;
        }
        self.running.finish(destination, started_ms)
    }

    fn end(&mut self, _bench: &Bench<'_>) -> Result<()> {
        self.running.end()
    }
}

/// An authority, a certificate for each host and the listener's Diffie-Hellman group,
/// once; P-256, as Godwit's own.
fn make_certificates(lab: &Lab) -> Result<()> {
    let ca = lab.dir().join("bench-ca");
    if ca.exists() {
        return Ok(());
    }
    fs::create_dir(&ca).context("cannot make a directory for certificates")?;
    let (ca_key, ca_cert) = (ca.join("ca-key.pem"), ca.join("ca-cert.pem"));
    request(
        &ca_key,
        &ca_cert,
        "/CN=bench-ca",
        &["-x509"],
        &["basicConstraints=critical,CA:true"],
    )?;
    for (n, role) in [(A, "client"), (B, "server")] {
        let dir = lab.host(n)?.dir().join("state/bench-tls");
        fs::create_dir(&dir).context("cannot make a directory for certificates")?;
        fs::copy(&ca_cert, dir.join("ca-cert.pem")).context("cannot copy the authority's certificate")?;
        let name = format!("bench-h{n}");
        let (key, cert) = (
            dir.join(format!("{role}-key.pem")),
            dir.join(format!("{role}-cert.pem")),
        );
        let (ca_key, ca_cert) = (ca_key.to_string_lossy(), ca_cert.to_string_lossy());
        let issuer = ["-x509", "-CA", &ca_cert, "-CAkey", &ca_key];
        let usage = format!("extendedKeyUsage={role}Auth");
        let alternative = format!("subjectAltName=DNS:{name}");
        let extensions = ["basicConstraints=critical,CA:false", &usage, &alternative];
        request(&key, &cert, &format!("/CN={name}"), &issuer, &extensions)?;
    }
    // Without this file the listening QEMU makes a 2048-bit prime of its own at every start: 0.1 to 1 s.
    let dh = lab.host(B)?.dir().join("state/bench-tls/dh-params.pem");
    let dh = dh.to_string_lossy();
    let group = ["-algorithm", "DH", "-pkeyopt", "group:ffdhe2048"];
    let mut argv = vec!["openssl", "genpkey", "-genparam", "-out", &dh];
    argv.extend(group);
    run(&argv).map(drop)
}

fn request(key: &Path, cert: &Path, subject: &str, how: &[&str], extensions: &[&str]) -> Result<()> {
    let (key, cert) = (key.to_string_lossy(), cert.to_string_lossy());
    let mut argv = vec![
        "openssl",
        "req",
        "-new",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-noenc",
    ];
    argv.extend(["-days", "30", "-subj", subject, "-keyout", &key, "-out", &cert]);
    argv.extend(how);
    argv.extend(extensions.iter().flat_map(|extension| ["-addext", extension]));
    run(&argv).map(drop)
}
