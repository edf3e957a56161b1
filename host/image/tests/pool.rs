//! The pool on a real file system with the real qemu-img: blobs, volumes, and that failures leave nothing behind.

// clippy's exemption for tests does not reach their helper functions.
#![allow(clippy::unwrap_used, clippy::panic)]

use image::{Base, Pool, ReceiveError, VolumeError, VolumeRequest};
use model::VolumeId;
use model::storage::{Digest, Format};
use model::template::Blob;
use sha2::{Digest as _, Sha256};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

fn blob_of(bytes: &[u8]) -> Blob {
    Blob {
        digest: Digest(Sha256::digest(bytes).into()),
        size_bytes: bytes.len() as u64,
    }
}

/// All files beneath a directory, lock files of open pools left out.
fn files(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![directory.to_path_buf()];
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            } else if entry.path().extension().is_none_or(|ending| ending != "lock") {
                found.push(entry.path().to_string_lossy().into_owned());
            }
        }
    }
    found
}

fn id(number: u128) -> VolumeId {
    VolumeId(Uuid::from_u128(number))
}

/// A qcow2 blob of 4 MiB in the pool.
fn base(pool: &Pool, scratch: &Path) -> Base {
    let path = scratch.join("base.qcow2");
    assert!(qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "4M"]));
    let bytes = std::fs::read(path).unwrap();
    pool.receive_blob(blob_of(&bytes), &mut bytes.as_slice()).unwrap();
    Base {
        digest: blob_of(&bytes).digest,
        format: Format::Qcow2,
    }
}

fn qemu_img(arguments: &[&str]) -> bool {
    Command::new("qemu-img").args(arguments).status().unwrap().success()
}

#[test]
fn a_blob_is_kept_read_only_under_its_digest_and_survives_reopening() {
    let root = tempfile::tempdir().unwrap();
    let bytes = vec![7; 300_000];
    let blob = blob_of(&bytes);
    {
        let pool = Pool::open(root.path()).unwrap();
        pool.receive_blob(blob, &mut bytes.as_slice()).unwrap();
        // The second time nothing is read.
        pool.receive_blob(blob, &mut Broken(0)).unwrap();
    }
    let pool = Pool::open(root.path()).unwrap();
    assert_eq!(pool.blob_size(blob.digest).unwrap(), Some(300_000));
    assert_eq!(pool.blobs().unwrap(), [blob.digest]);
    assert!(pool.blob_is_intact(blob.digest).unwrap());
    assert_eq!(
        std::fs::metadata(pool.blob_path(blob.digest))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777,
        0o444
    );
    std::fs::write(pool.blob_path(blob.digest), b"rot").unwrap();
    assert!(!pool.blob_is_intact(blob.digest).unwrap());
    assert!(pool.delete_blob(blob.digest).unwrap());
    assert!(!pool.delete_blob(blob.digest).unwrap(), "deleting again is no error");
}

/// Gives so many bytes and then fails.
struct Broken(usize);

impl Read for Broken {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = into.len().min(self.0);
        self.0 -= length;
        if length == 0 {
            Err(io::ErrorKind::ConnectionReset.into())
        } else {
            Ok(length)
        }
    }
}

#[test]
fn a_blob_that_is_short_long_wrong_or_broken_off_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let pool = Pool::open(root.path()).unwrap();
    let bytes = vec![1; 100_000];
    let blob = blob_of(&bytes);
    let receive = |mut stream: &[u8]| pool.receive_blob(blob, &mut stream).unwrap_err();
    assert!(matches!(
        receive(&bytes[1..]),
        ReceiveError::TooShort { got: 99_999, .. }
    ));
    assert!(matches!(
        receive(&[1; 100_001]),
        ReceiveError::TooLong { limit: 100_000 }
    ));
    assert!(matches!(receive(&[2; 100_000]), ReceiveError::Digest { .. }));
    let broken = pool.receive_blob(blob, &mut Broken(5_000)).unwrap_err();
    assert!(matches!(broken, ReceiveError::Stream { got: 5_000, .. }));
    // An endless stream ends at the announced size.
    let endless = pool.receive_blob(blob, &mut io::repeat(1)).unwrap_err();
    assert!(matches!(endless, ReceiveError::TooLong { .. }));
    assert_eq!(files(root.path()), [""; 0]);
}

#[test]
fn what_a_dead_agent_left_is_swept_and_what_a_live_one_receives_is_not() {
    let root = tempfile::tempdir().unwrap();
    let alive = Pool::open(root.path()).unwrap();
    let mut incoming = alive.incoming(10).unwrap();
    incoming.write(b"12345").unwrap();
    // As a killed agent leaves it: a directory, a file, a lock file that nobody holds.
    let dead = Uuid::from_u128(1);
    let leftovers = root.path().join("incoming").join(dead.to_string());
    std::fs::create_dir(&leftovers).unwrap();
    std::fs::write(leftovers.join("0"), "half").unwrap();
    std::fs::write(root.path().join("incoming").join(format!("{dead}.lock")), "").unwrap();

    let second = Pool::open(root.path()).unwrap();
    assert!(!leftovers.exists());
    incoming.write(b"67890").unwrap();
    let blob = blob_of(b"1234567890");
    incoming.keep_as_blob(blob).unwrap();
    assert_eq!(second.blob_size(blob.digest).unwrap(), Some(10));
    drop((alive, second));
    assert_eq!(std::fs::read_dir(root.path().join("incoming")).unwrap().count(), 0);
}

#[test]
fn a_symbolic_link_in_the_pool_is_not_followed() {
    let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pool = Pool::open(root.path()).unwrap();
    let digest = blob_of(b"x").digest;
    std::os::unix::fs::symlink("/etc/hostname", pool.blob_path(digest)).unwrap();
    assert!(pool.open_blob(digest).is_err());
    std::fs::remove_dir(root.path().join("volumes")).unwrap();
    std::os::unix::fs::symlink(outside.path(), root.path().join("volumes")).unwrap();
    std::fs::write(outside.path().join(format!("{}.raw", id(1))), "theirs").unwrap();
    assert!(pool.delete_volume(id(1), Format::Raw).is_err());
    assert!(pool.give_volume(id(1), Format::Raw, 1, 1).is_err());
    let request = VolumeRequest {
        id: id(2),
        format: Format::Raw,
        size_bytes: MIB,
        base: None,
    };
    assert!(pool.create_volume(&request).is_err());
    assert_eq!(files(outside.path()).len(), 1);
    assert!(Pool::open(root.path()).is_err(), "nor is it opened again as a pool");
}

#[test]
fn an_overlay_stands_on_its_blob_wherever_the_pool_is_mounted() {
    let (parent, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let root = parent.path().join("pool, with=odd:name");
    let pool = Pool::open(&root).unwrap();
    let base = base(&pool, scratch.path());
    let request = VolumeRequest {
        id: id(1),
        format: Format::Qcow2,
        size_bytes: 8 * MIB,
        base: Some(base),
    };
    pool.create_volume(&request).unwrap();
    pool.create_volume(&request).unwrap();
    let usage = pool.volume_usage(id(1), Format::Qcow2).unwrap();
    assert_eq!(usage.size_bytes, 8 * MIB);
    assert!(usage.allocated_bytes < MIB, "it is thin: {usage:?}");

    let moved = parent.path().join("elsewhere");
    std::fs::rename(&root, &moved).unwrap();
    let overlay = moved.join("volumes").join(format!("{}.qcow2", id(1)));
    assert!(qemu_img(&["check", "-q", "-f", "qcow2", overlay.to_str().unwrap()]));
    assert!(
        qemu_img(&["compare", "-q", overlay.to_str().unwrap(), overlay.to_str().unwrap()]),
        "its base is found"
    );
}

#[test]
fn a_volume_that_cannot_be_is_refused_with_the_reason_and_leaves_nothing() {
    let (root, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pool = Pool::open(root.path()).unwrap();
    let base = base(&pool, scratch.path());
    let before = files(root.path());
    let plain = VolumeRequest {
        id: id(1),
        format: Format::Qcow2,
        size_bytes: 8 * MIB,
        base: None,
    };
    let refused = |request: VolumeRequest| pool.create_volume(&request).unwrap_err();
    for size_bytes in [0, 1, 511, 60 << 50, u64::MAX] {
        assert!(matches!(
            refused(VolumeRequest { size_bytes, ..plain }),
            VolumeError::Size { .. }
        ));
    }
    let raw = VolumeRequest {
        format: Format::Raw,
        base: Some(base),
        ..plain
    };
    assert!(matches!(refused(raw), VolumeError::RawOverlay));
    let smaller = VolumeRequest {
        size_bytes: 2 * MIB,
        base: Some(base),
        ..plain
    };
    assert!(matches!(
        refused(smaller),
        VolumeError::Smaller {
            base_bytes: 4_194_304,
            ..
        }
    ));
    let absent = Base {
        digest: Digest([0; 32]),
        format: Format::Qcow2,
    };
    assert!(matches!(
        refused(VolumeRequest {
            base: Some(absent),
            ..plain
        }),
        VolumeError::NoBase { .. }
    ));
    assert_eq!(files(root.path()), before);
}

/// Such a base would read whatever file it names.
#[test]
fn a_base_that_is_itself_an_overlay_is_refused() {
    let (root, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pool = Pool::open(root.path()).unwrap();
    let chained = scratch.path().join("chained.qcow2");
    assert!(qemu_img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        "/etc/shadow",
        chained.to_str().unwrap(),
        "4M"
    ]));
    let bytes = std::fs::read(chained).unwrap();
    pool.receive_blob(blob_of(&bytes), &mut bytes.as_slice()).unwrap();
    let chained = Base {
        digest: blob_of(&bytes).digest,
        format: Format::Qcow2,
    };
    let request = VolumeRequest {
        id: id(1),
        format: Format::Qcow2,
        size_bytes: 8 * MIB,
        base: Some(chained),
    };
    assert!(matches!(pool.create_volume(&request), Err(VolumeError::BadBase { .. })));
    assert!(!pool.volume_path(id(1), Format::Qcow2).exists());
}

#[test]
fn a_volume_is_private_to_its_user_and_made_and_deleted_at_most_once() {
    let root = tempfile::tempdir().unwrap();
    let pool = Pool::open(root.path()).unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let request = VolumeRequest {
            id: id(5),
            format,
            size_bytes: 4 * MIB,
            base: None,
        };
        pool.create_volume(&request).unwrap();
        let path = pool.volume_path(id(5), format);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
        // The tests may run as any user: giving to oneself needs no rights.
        let me = std::fs::metadata(&path).unwrap();
        pool.give_volume(id(5), format, me.uid(), me.gid()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(pool.volume_usage(id(5), format).unwrap().size_bytes, 4 * MIB);
        pool.create_volume(&request).unwrap();
        let larger = VolumeRequest {
            size_bytes: 8 * MIB,
            ..request
        };
        assert!(matches!(
            pool.create_volume(&larger),
            Err(VolumeError::Different { .. })
        ));
        assert!(pool.delete_volume(id(5), format).unwrap());
        assert!(!pool.delete_volume(id(5), format).unwrap());
        assert!(matches!(
            pool.volume_usage(id(5), format),
            Err(VolumeError::Absent { .. })
        ));
    }
    assert!(pool.capacity().unwrap().free_bytes > 0);
    assert_eq!(files(root.path()), [""; 0]);
}

#[test]
fn what_another_host_put_in_a_volumes_or_a_blobs_place_is_not_opened() {
    let root = tempfile::tempdir().unwrap();
    let pool = Pool::open(root.path()).unwrap();
    let request = VolumeRequest {
        id: id(5),
        format: Format::Raw,
        size_bytes: 4 * MIB,
        base: None,
    };
    pool.create_volume(&request).unwrap();
    let opened = pool.open_volume(id(5), Format::Raw).unwrap();
    let flags = |file| rustix::fs::fcntl_getfl(file).unwrap();
    assert!(flags(&opened.write).contains(rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT));
    assert!(!flags(&opened.read).intersects(rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK));
    assert!(matches!(
        pool.open_volume(id(6), Format::Raw),
        Err(VolumeError::Absent { .. })
    ));
    let digest = Digest([9; 32]);
    for place in [pool.volume_path(id(5), Format::Raw), pool.blob_path(digest)] {
        let _ = std::fs::remove_file(&place);
        let refused = || pool.open_volume(id(5), Format::Raw).is_err() && pool.open_blob(digest).is_err();
        std::os::unix::fs::symlink("/etc/passwd", &place).unwrap();
        assert!(refused(), "a link");
        std::fs::remove_file(&place).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &place, fifo, 0o666.into(), 0).unwrap();
        assert!(refused(), "a pipe, which would be waited for");
    }
}
