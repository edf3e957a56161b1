//! A corpus of hostile images, made by the test, and random mutations: typed refusals, no panic, no residue.

// clippy's exemption for tests does not reach their helper functions.
#![allow(clippy::unwrap_used, clippy::panic)]

use image::{ImportError, ImportLimits, Pool, Refusal, vet};
use model::storage::Format;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

const LIMITS: ImportLimits = ImportLimits {
    virtual_bytes: 1 << 40,
    output_bytes: 64 << 20,
    deadline: Duration::from_secs(60),
};

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A sound qcow2 of 4 MiB with 256 KiB of data.
fn sound() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let raw = directory.path().join("data.raw");
        let data: Vec<u8> = (0..4 << 20)
            .map(|at: u32| if at < 256 << 10 { (at % 251) as u8 } else { 0 })
            .collect();
        std::fs::write(&raw, data).unwrap();
        let image = directory.path().join("sound.qcow2");
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            raw.to_str().unwrap(),
            image.to_str().unwrap(),
        ]);
        std::fs::read(image).unwrap()
    })
}

fn file(directory: &Path, bytes: &[u8]) -> PathBuf {
    let path = directory.join("image");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The refusal of `bytes` declared as `format`, which must leave the pool empty too.
fn refusal(bytes: &[u8], format: Format) -> Refusal {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), bytes);
    let pool = Pool::open(&directory.path().join("pool")).unwrap();
    let imported = pool.import(&path, format, LIMITS, &mut |_, _| ());
    assert!(matches!(imported, Err(ImportError::Refused(_))), "{imported:?}");
    assert!(pool.blobs().unwrap().is_empty());
    vet(&path, format).unwrap_err()
}

/// The sound image with `value` written at `at`.
fn changed(at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = sound().to_vec();
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

#[test]
fn a_sound_image_becomes_a_fresh_qcow2_with_the_same_content() {
    let directory = tempfile::tempdir().unwrap();
    let pool = Pool::open(&directory.path().join("pool")).unwrap();
    let path = file(directory.path(), sound());
    let mut steps = Vec::new();
    let imported = pool
        .import(&path, Format::Qcow2, LIMITS, &mut |done, total| {
            steps.push((done, total))
        })
        .unwrap();
    assert_eq!(imported.virtual_bytes, 4 << 20);
    assert_eq!(imported.original.file_bytes, sound().len() as u64);
    assert_eq!(steps.last(), Some(&(4 << 20, 4 << 20)));
    let blob = pool.blob_path(imported.blob.digest);
    qemu_img(&[
        "compare",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        path.to_str().unwrap(),
        blob.to_str().unwrap(),
    ]);
    assert!(pool.blob_is_intact(imported.blob.digest).unwrap());

    let raw = directory.path().join("raw");
    qemu_img(&["convert", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    let again = pool.import(&raw, Format::Raw, LIMITS, &mut |_, _| ()).unwrap();
    assert_eq!(
        again.blob.digest, imported.blob.digest,
        "the same content is the same blob, whatever it came in"
    );
}

#[test]
fn images_of_every_kind_that_qemu_img_makes_are_let_in() {
    let directory = tempfile::tempdir().unwrap();
    let source = file(directory.path(), sound());
    for options in [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=32k",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "refcount_bits=64",
        "preallocation=metadata",
        "preallocation=full",
    ] {
        let image = directory.path().join("kind.qcow2");
        let (from, to) = (source.to_str().unwrap(), image.to_str().unwrap());
        qemu_img(&["convert", "-O", "qcow2", "-o", options, from, to]);
        let info = vet(&image, Format::Qcow2).unwrap_or_else(|refusal| panic!("{options}: {refusal}"));
        assert_eq!(info.virtual_bytes, 4 << 20);
        if !options.contains("preallocation") {
            qemu_img(&["convert", "-c", "-O", "qcow2", "-o", options, from, to]);
            vet(&image, Format::Qcow2).unwrap_or_else(|refusal| panic!("compressed, {options}: {refusal}"));
            qemu_img(&["snapshot", "-c", "before", to]);
            vet(&image, Format::Qcow2).unwrap_or_else(|refusal| panic!("with a snapshot, {options}: {refusal}"));
        }
    }
}

#[test]
fn an_image_that_reads_other_files_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let to = image.to_str().unwrap();
    for backing in [
        "/etc/shadow",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
        "nbd:127.0.0.1:10809",
        "image",
    ] {
        qemu_img(&[
            "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, to, "4M",
        ]);
        assert!(
            matches!(
                refusal(&std::fs::read(&image).unwrap(), Format::Qcow2),
                Refusal::BackingFile
            ),
            "{backing}"
        );
    }
    let data = directory.path().join("data");
    let options = format!("data_file={},data_file_raw=on", data.display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, to, "4M"]);
    let mut bytes = std::fs::read(&image).unwrap();
    assert!(matches!(refusal(&bytes, Format::Qcow2), Refusal::DataFile));
    // The name alone, without the feature bit.
    bytes[79] &= !4;
    assert!(matches!(refusal(&bytes, Format::Qcow2), Refusal::DataFile));
}

#[test]
fn a_field_out_of_bounds_is_refused_by_its_name() {
    let cases: [(usize, &[u8], &str); 14] = [
        (4, &9_u32.to_be_bytes(), "version"),
        (8, &70_u64.to_be_bytes(), "backing_file_offset"),
        (16, &u32::MAX.to_be_bytes(), "backing_file_offset"),
        (20, &63_u32.to_be_bytes(), "cluster_bits"),
        (20, &8_u32.to_be_bytes(), "cluster_bits"),
        (36, &0_u32.to_be_bytes(), "l1_size"),
        (36, &u32::MAX.to_be_bytes(), "l1_size"),
        (40, &1_u64.to_be_bytes(), "l1_table_offset"),
        (48, &0_u64.to_be_bytes(), "refcount_table_offset"),
        (56, &u32::MAX.to_be_bytes(), "refcount_table_clusters"),
        (60, &u32::MAX.to_be_bytes(), "nb_snapshots"),
        (96, &7_u32.to_be_bytes(), "refcount_order"),
        (100, &u32::MAX.to_be_bytes(), "header_length"),
        (104, &[9], "compression_type"),
    ];
    for (at, value, name) in cases {
        match refusal(&changed(at, value), Format::Qcow2) {
            Refusal::Field { field, .. } => assert_eq!(field, name),
            other => panic!("{name}: {other}"),
        }
    }
    let virtual_size = refusal(&changed(24, &(60_u64 << 50).to_be_bytes()), Format::Qcow2);
    assert!(
        matches!(virtual_size, Refusal::VirtualSize { .. }),
        "60 PiB: {virtual_size}"
    );
    assert!(matches!(
        refusal(&changed(32, &2_u32.to_be_bytes()), Format::Qcow2),
        Refusal::Encrypted
    ));
    let unknown = refusal(&changed(72, &(1_u64 << 40).to_be_bytes()), Format::Qcow2);
    assert!(matches!(unknown, Refusal::UnknownFeatures { bits: 0x100_0000_0000 }));
    assert!(matches!(
        refusal(&changed(72, &2_u64.to_be_bytes()), Format::Qcow2),
        Refusal::NotClean
    ));
    for at in [40, 48] {
        let past_the_end = refusal(&changed(at, &(1_u64 << 40).to_be_bytes()), Format::Qcow2);
        assert!(matches!(past_the_end, Refusal::Truncated { .. }), "{past_the_end}");
    }
}

#[test]
fn a_table_that_points_outside_the_file_is_refused() {
    let l1_at = u64::from_be_bytes(sound()[40..48].try_into().unwrap()) as usize;
    let l1 = u64::from_be_bytes(sound()[l1_at..l1_at + 8].try_into().unwrap());
    let l2_at = (l1 & 0x00ff_ffff_ffff_fe00) as usize;
    let beyond = (1_u64 << 63 | 1 << 40).to_be_bytes();
    assert!(matches!(
        refusal(&changed(l1_at, &beyond), Format::Qcow2),
        Refusal::Truncated { .. }
    ));
    assert!(matches!(
        refusal(&changed(l2_at, &beyond), Format::Qcow2),
        Refusal::Truncated { .. }
    ));
    let unaligned = (1_u64 << 63 | 0x1_0200).to_be_bytes();
    assert!(matches!(
        refusal(&changed(l2_at, &unaligned), Format::Qcow2),
        Refusal::Field { field: "L2 table", .. }
    ));
    let compressed_beyond = (1_u64 << 62 | 1 << 40).to_be_bytes();
    assert!(matches!(
        refusal(&changed(l2_at, &compressed_beyond), Format::Qcow2),
        Refusal::Truncated { .. }
    ));
    // Two first-level entries that share a table: the walk would be longer than the file.
    let mut shared = changed(36, &2_u32.to_be_bytes());
    shared[l1_at + 8..l1_at + 16].copy_from_slice(&l1.to_be_bytes());
    assert!(matches!(
        refusal(&shared, Format::Qcow2),
        Refusal::Field { field: "L1 table", .. }
    ));
    for length in [0, 3, 71, 103, 65_536, sound().len() - 200_000] {
        let cut = refusal(&sound()[..length], Format::Qcow2);
        assert!(
            matches!(cut, Refusal::Truncated { .. } | Refusal::Empty | Refusal::NotQcow2),
            "{length}: {cut}"
        );
    }
}

#[test]
fn an_image_that_is_two_formats_or_another_than_declared_is_refused() {
    let declared_raw = refusal(sound(), Format::Raw);
    assert!(matches!(
        declared_raw,
        Refusal::Polyglot {
            declared: "raw",
            found: "qcow2"
        }
    ));
    let directory = tempfile::tempdir().unwrap();
    let source = file(directory.path(), sound());
    for (format, name) in [
        ("vmdk", "VMDK"),
        ("vdi", "VDI"),
        ("vhdx", "VHDX"),
        ("vpc", "VHD"),
        ("qed", "QED"),
    ] {
        let other = directory.path().join(format);
        qemu_img(&[
            "convert",
            "-f",
            "qcow2",
            "-O",
            format,
            source.to_str().unwrap(),
            other.to_str().unwrap(),
        ]);
        let bytes = std::fs::read(&other).unwrap();
        for declared in [Format::Raw, Format::Qcow2] {
            let found = refusal(&bytes, declared);
            assert!(
                matches!(found, Refusal::Polyglot { found, .. } if found == name),
                "{format}: {found}"
            );
        }
    }
    let iso = refusal(&changed(32_769, b"CD001"), Format::Qcow2);
    assert!(matches!(iso, Refusal::Polyglot { found: "ISO 9660", .. }));
    assert!(matches!(
        refusal(&[0; 1000], Format::Raw),
        Refusal::PartSector { file_bytes: 1000 }
    ));
    assert!(matches!(refusal(&[], Format::Raw), Refusal::Empty));
}

#[test]
fn only_a_regular_file_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink("/etc/shadow", &link).unwrap();
    let pipe = directory.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [directory.path(), &link, &pipe, Path::new("/dev/zero")] {
        assert!(
            matches!(vet(path, Format::Raw), Err(Refusal::NotAFile)),
            "{}",
            path.display()
        );
    }
    assert!(matches!(
        vet(&directory.path().join("absent"), Format::Raw),
        Err(Refusal::Unreadable(_))
    ));
}

#[test]
fn a_bomb_is_stopped_at_the_output_limit_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("raw");
    // Compresses to almost nothing, and is not zeros.
    std::fs::write(&raw, vec![0x5a; 32 << 20]).unwrap();
    let bomb = directory.path().join("bomb");
    qemu_img(&[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        raw.to_str().unwrap(),
        bomb.to_str().unwrap(),
    ]);
    assert!(std::fs::metadata(&bomb).unwrap().len() < 2 << 20);
    let pool = Pool::open(&directory.path().join("pool")).unwrap();
    let limits = ImportLimits {
        output_bytes: 8 << 20,
        ..LIMITS
    };
    let stopped = pool.import(&bomb, Format::Qcow2, limits, &mut |_, _| ());
    assert!(
        matches!(stopped, Err(ImportError::TooLarge { limit: 8_388_608 })),
        "{stopped:?}"
    );
    let limits = ImportLimits {
        virtual_bytes: 1 << 20,
        ..LIMITS
    };
    let stopped = pool.import(&bomb, Format::Qcow2, limits, &mut |_, _| ());
    assert!(
        matches!(stopped, Err(ImportError::Refused(Refusal::VirtualSize { .. }))),
        "{stopped:?}"
    );
    let limits = ImportLimits {
        deadline: Duration::ZERO,
        ..LIMITS
    };
    let stopped = pool.import(&bomb, Format::Qcow2, limits, &mut |_, _| ());
    assert!(matches!(stopped, Err(ImportError::TooSlow { .. })), "{stopped:?}");
    assert!(pool.blobs().unwrap().is_empty());
    drop(pool);
    assert_eq!(
        std::fs::read_dir(directory.path().join("pool/incoming"))
            .unwrap()
            .count(),
        0
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever happens to the header, the reader does not panic, and what it lets in names no other file.
    #[test]
    fn a_mutated_header_never_panics_and_never_smuggles_a_file(
        smuggled in prop_oneof![
            Just(None),
            // A backing file's name where one may be: alone random bytes would hardly ever hit upon it.
            (112_u64..4096, 1_u32..1024).prop_map(|(at, length)| Some((at, length, 0))),
            (0_u8..32).prop_map(|bits| Some((0, 0, bits))),
        ],
        writes in proptest::collection::vec((0_usize..600, any::<u8>()), 0..4),
        whole in proptest::option::of((0_usize..14, prop_oneof![any::<u64>(), Just(u64::MAX), 0_u64..1 << 24])),
        length in prop_oneof![4 => Just(usize::MAX), 1 => 0_usize..700_000],
    ) {
        let mut bytes = sound().to_vec();
        if let Some((field, value)) = whole {
            bytes[field * 8..field * 8 + 8].copy_from_slice(&value.to_be_bytes());
        }
        if let Some((at, length, features)) = smuggled {
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&length.to_be_bytes());
            bytes[79] = features;
        }
        for (at, value) in writes {
            bytes[at] = value;
        }
        bytes.truncate(length);
        let directory = tempfile::tempdir().unwrap();
        let path = file(directory.path(), &bytes);
        if let Ok(info) = vet(&path, Format::Qcow2) {
            prop_assert_eq!(&bytes[8..20], &[0; 12], "a backing file");
            prop_assert!(bytes[7] == 2 || bytes[79] & 4 == 0, "a data file");
            prop_assert_eq!(&bytes[32..36], &[0; 4], "a key");
            prop_assert!(info.virtual_bytes <= image::VIRTUAL_BYTES_MAX);
        }
        // As raw, the magic alone decides.
        let raw = vet(&path, Format::Raw);
        prop_assert!(raw.is_err() || !bytes.starts_with(b"QFI\xfb"));
    }

    /// Nor does anything in the tables.
    #[test]
    fn mutated_tables_never_panic(
        writes in proptest::collection::vec((0_usize..64, any::<u64>(), any::<bool>()), 1..6),
    ) {
        let mut bytes = sound().to_vec();
        let l1_at = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
        let l2_at = (u64::from_be_bytes(bytes[l1_at..l1_at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize;
        for (entry, value, first_level) in writes {
            let at = if first_level { l1_at } else { l2_at + entry * 8 };
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        let directory = tempfile::tempdir().unwrap();
        let path = file(directory.path(), &bytes);
        if let Err(refusal) = vet(&path, Format::Qcow2) {
            prop_assert!(matches!(refusal, Refusal::Truncated { .. } | Refusal::Field { .. }), "{}", refusal);
        }
    }
}
