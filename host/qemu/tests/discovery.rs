//! What a real QEMU can do, and which accelerator really runs guests here. `GODWIT_QEMU` names another QEMU: a program or an
//! unpacked tree.

use std::path::{Path, PathBuf};

use model::host::Accelerator;
use model::layout::Family;
use qemu::{DiscoverError, Program, discover, probe};

fn program() -> Program {
    Program::locate(std::env::var_os("GODWIT_QEMU").map(PathBuf::from).as_deref())
}

#[tokio::test]
async fn a_real_qemu_tells_what_it_can_do() {
    let capabilities = discover(&program()).await.unwrap();
    let version = capabilities.version;
    assert_eq!(
        capabilities.newest[&Family::Q35],
        format!("pc-q35-{}.{}", version.major, version.minor)
    );
    assert_eq!(
        capabilities.newest[&Family::Pc],
        format!("pc-i440fx-{}.{}", version.major, version.minor)
    );
    assert!(capabilities.machines.contains("pc-q35-7.2"));
    for wanted in [
        "return-path",
        "events",
        "late-block-activate",
        "pause-before-switchover",
        "multifd",
    ] {
        assert!(capabilities.migration.contains(wanted), "{wanted}");
    }
    assert_eq!(capabilities.migration.contains("mapped-ram"), version.major >= 9);
    assert!(capabilities.sandbox, "Debian and Ubuntu build with seccomp");
    assert!(capabilities.schema.has_command("yank"));
    let hypervisor = capabilities.hypervisor(Accelerator::Tcg, "as said".into());
    assert_eq!(
        (hypervisor.kind.as_str(), hypervisor.version),
        ("qemu", version.to_string())
    );
}

#[tokio::test]
async fn what_is_no_qemu_is_told_from_one() {
    let missing = discover(&Program::at("/nonexistent/qemu")).await.unwrap_err();
    assert!(matches!(missing, DiscoverError::Start { .. }), "{missing}");
    assert!(missing.to_string().contains("apt install"));
    let ended = discover(&Program::at("/bin/false")).await.unwrap_err();
    assert!(matches!(ended, DiscoverError::Ended { .. }), "{ended}");
}

/// Whether this host's KVM can be believed is not known here; what is known is that one of the two runs the guest rightly.
#[tokio::test]
async fn the_probe_runs_its_guest_and_chooses() {
    let verdict = probe(&program()).await.unwrap();
    println!("{}", verdict.reason);
    assert!(verdict.reason.starts_with("kvm: "), "{}", verdict.reason);
    if !Path::new("/dev/kvm").exists() {
        assert_eq!(verdict.accelerator, Accelerator::Tcg);
    }
    assert_eq!(
        verdict.accelerator == Accelerator::Tcg,
        verdict.reason.ends_with("using tcg")
    );
}
