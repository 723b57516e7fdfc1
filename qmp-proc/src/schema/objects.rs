//! Types of the commands about objects, and object-add's two forms.
//!
//! Servers of today take an object's properties beside its id; those of the time of QMP 2.0 took them in `props`. Both mean
//! the same: [`flatten`] makes the first of the second before anything is checked.

use super::types::{
    CommandType, EnumType, INT, IntType, NOTHING, StructType, Type, Variants, enumeration, optional, required,
    structure, supervised,
};
use crate::json::{Object, Value};
use ipc::qmp::QmpError;

pub(super) const OBJECT_ADD_COMMAND: CommandType = supervised("object-add", &OBJECT_ADD, NOTHING);
pub(super) const OBJECT_DEL_COMMAND: CommandType = supervised("object-del", &OBJECT_DEL, NOTHING);
pub(super) const QOM_LIST_COMMAND: CommandType = supervised("qom-list", &QOM_LIST, PROPERTIES);
pub(super) const QOM_GET_COMMAND: CommandType = supervised("qom-get", &QOM_GET, Type::Any);
pub(super) const QOM_SET_COMMAND: CommandType = supervised("qom-set", &QOM_SET, NOTHING);
pub(super) const QOM_LIST_TYPES_COMMAND: CommandType = supervised("qom-list-types", &QOM_LIST_TYPES, TYPES);
pub(super) const QOM_LIST_PROPERTIES_COMMAND: CommandType =
    supervised("qom-list-properties", &QOM_LIST_PROPERTIES, PROPERTIES);
pub(super) const DEVICE_LIST_PROPERTIES_COMMAND: CommandType =
    supervised("device-list-properties", &DEVICE_LIST_PROPERTIES, PROPERTIES);

const PROPERTIES: Type = Type::Array(&PROPERTY);
const PROPERTY: Type = Type::Struct(&PROPERTY_INFO);
const TYPES: Type = Type::Array(&OBJECT_TYPE_INFO);
const OBJECT_TYPE_INFO: Type = Type::Struct(&TYPE_INFO);

/// Puts the members of `props` beside the others.
///
/// # Errors
/// When `props` is no object, or a member is there already.
pub fn flatten(command: &CommandType, mut arguments: Object) -> Result<Object, QmpError> {
    if command.name != "object-add" {
        return Ok(arguments);
    }
    let Some(props) = arguments.remove("props") else {
        return Ok(arguments);
    };
    let Value::Object(props) = props else {
        return Err(QmpError::generic(
            "Invalid parameter type for 'props', expected: object",
        ));
    };
    for (name, value) in props.into_entries() {
        if matches!(&*name, "qom-type" | "id") || arguments.get(&name).is_some() {
            return Err(QmpError::generic(format!("Parameter 'props.{name}' is unexpected")));
        }
        arguments.push(name, value);
    }
    Ok(arguments)
}

static OBJECT_ADD: StructType = StructType {
    name: "ObjectOptions",
    members: &[
        required("qom-type", Type::Enum(&OBJECT_TYPE)),
        required("id", Type::Str),
    ],
    variants: Some(&Variants {
        tag: "qom-type",
        of: &[
            ("iothread", &IOTHREAD),
            ("memory-backend-memfd", &MEMORY_BACKEND_MEMFD),
            ("rng-random", &RNG_RANDOM),
            ("secret", &SECRET),
            ("throttle-group", &THROTTLE_GROUP),
        ],
    }),
};
static OBJECT_TYPE: EnumType = enumeration(
    "ObjectType",
    &[
        "iothread",
        "memory-backend-memfd",
        "rng-builtin",
        "rng-random",
        "secret",
        "throttle-group",
    ],
);
static IOTHREAD: StructType = structure(
    "IothreadProperties",
    &[
        optional("aio-max-batch", INT),
        optional("poll-max-ns", INT),
        optional("poll-grow", INT),
        optional("poll-shrink", INT),
    ],
);
static MEMORY_BACKEND_MEMFD: StructType = structure(
    "MemoryBackendMemfdProperties",
    &[
        optional("prealloc", Type::Bool),
        optional("share", Type::Bool),
        required("size", Type::Int(IntType::Size)),
        optional("seal", Type::Bool),
    ],
);
static RNG_RANDOM: StructType = structure("RngRandomProperties", &[optional("filename", Type::Str)]);
static SECRET: StructType = structure(
    "SecretProperties",
    &[
        optional("format", Type::Enum(&SECRET_FORMAT)),
        optional("data", Type::Str),
        optional("file", Type::Str),
    ],
);
static SECRET_FORMAT: EnumType = enumeration("QCryptoSecretFormat", &["raw", "base64"]);
static THROTTLE_GROUP: StructType = structure(
    "ThrottleGroupProperties",
    &[
        optional("limits", Type::Struct(&THROTTLE_LIMITS)),
        optional("x-iops-total", INT),
        optional("x-iops-total-max", INT),
        optional("x-iops-total-max-length", INT),
        optional("x-iops-read", INT),
        optional("x-iops-read-max", INT),
        optional("x-iops-read-max-length", INT),
        optional("x-iops-write", INT),
        optional("x-iops-write-max", INT),
        optional("x-iops-write-max-length", INT),
        optional("x-bps-total", INT),
        optional("x-bps-total-max", INT),
        optional("x-bps-total-max-length", INT),
        optional("x-bps-read", INT),
        optional("x-bps-read-max", INT),
        optional("x-bps-read-max-length", INT),
        optional("x-bps-write", INT),
        optional("x-bps-write-max", INT),
        optional("x-bps-write-max-length", INT),
        optional("x-iops-size", INT),
    ],
);
static THROTTLE_LIMITS: StructType = structure(
    "ThrottleLimits",
    &[
        optional("iops-total", INT),
        optional("iops-total-max", INT),
        optional("iops-total-max-length", INT),
        optional("iops-read", INT),
        optional("iops-read-max", INT),
        optional("iops-read-max-length", INT),
        optional("iops-write", INT),
        optional("iops-write-max", INT),
        optional("iops-write-max-length", INT),
        optional("bps-total", INT),
        optional("bps-total-max", INT),
        optional("bps-total-max-length", INT),
        optional("bps-read", INT),
        optional("bps-read-max", INT),
        optional("bps-read-max-length", INT),
        optional("bps-write", INT),
        optional("bps-write-max", INT),
        optional("bps-write-max-length", INT),
        optional("iops-size", INT),
    ],
);
static OBJECT_DEL: StructType = structure("q_obj_object-del-arg", &[required("id", Type::Str)]);
static QOM_LIST: StructType = structure("q_obj_qom-list-arg", &[required("path", Type::Str)]);
static QOM_GET: StructType = structure(
    "q_obj_qom-get-arg",
    &[required("path", Type::Str), required("property", Type::Str)],
);
static QOM_SET: StructType = structure(
    "q_obj_qom-set-arg",
    &[
        required("path", Type::Str),
        required("property", Type::Str),
        required("value", Type::Any),
    ],
);
static QOM_LIST_TYPES: StructType = structure(
    "q_obj_qom-list-types-arg",
    &[optional("implements", Type::Str), optional("abstract", Type::Bool)],
);
static QOM_LIST_PROPERTIES: StructType = structure("q_obj_qom-list-properties-arg", &[required("typename", Type::Str)]);
static DEVICE_LIST_PROPERTIES: StructType =
    structure("q_obj_device-list-properties-arg", &[required("typename", Type::Str)]);
static PROPERTY_INFO: StructType = structure(
    "ObjectPropertyInfo",
    &[
        required("name", Type::Str),
        required("type", Type::Str),
        optional("description", Type::Str),
        optional("default-value", Type::Any),
    ],
);
static TYPE_INFO: StructType = structure(
    "ObjectTypeInfo",
    &[
        required("name", Type::Str),
        optional("abstract", Type::Bool),
        optional("parent", Type::Str),
    ],
);

#[cfg(test)]
mod tests {
    use super::super::{check, decode, find};
    use super::*;
    use crate::json::{Reader, ser};
    use ipc::objects::types::{Kind, OBJECT_TYPES};
    use ipc::objects::{ObjectPropertyInfo, ObjectTypeInfo, PropertyValue};
    use ipc::qmp::Command;

    fn same(ty: &Type, kind: Kind) -> bool {
        match (ty, kind) {
            (Type::Bool, Kind::Bool)
            | (Type::Int(IntType::Int), Kind::Int)
            | (Type::Int(IntType::Size), Kind::Size)
            | (Type::Str, Kind::Text) => true,
            (Type::Enum(words), Kind::Word(known)) => words.values == known,
            (Type::Struct(of), Kind::Ints(names)) => {
                of.members.iter().map(|member| member.name).eq(names.iter().copied())
                    && of.members.iter().all(|member| same(&member.ty, Kind::Int))
            }
            _ => false,
        }
    }

    /// What clients may say and what the supervisor understands.
    #[test]
    fn the_objects_are_those_that_the_supervisor_makes() {
        assert!(
            OBJECT_TYPE
                .values
                .iter()
                .copied()
                .eq(OBJECT_TYPES.iter().map(|ty| ty.name))
        );
        for ty in OBJECT_TYPES {
            let variants = OBJECT_ADD.variants.unwrap().of;
            let members = variants
                .iter()
                .find(|(name, _)| *name == ty.name)
                .map_or(&[][..], |(_, of)| of.members);
            assert_eq!(members.len(), ty.properties.len(), "{}", ty.name);
            for (member, property) in members.iter().zip(ty.properties) {
                assert_eq!(member.name, property.name);
                assert_eq!(member.optional, !property.required, "{}.{}", ty.name, member.name);
                assert!(same(&member.ty, property.kind), "{}.{}", ty.name, member.name);
            }
        }
    }

    fn object_add(text: &str) -> Result<Command, String> {
        let Value::Object(arguments) = Reader::default().next(&mut text.as_bytes()).unwrap().unwrap() else {
            panic!("{text}")
        };
        decode(find("object-add").unwrap(), arguments).map_err(|error| error.desc)
    }

    #[test]
    fn both_forms_of_object_add_mean_the_same() {
        let old = object_add("{'qom-type': 'rng-random', 'id': 'r', 'props': {'filename': '/dev/hwrng'}}").unwrap();
        let new = object_add("{'qom-type': 'rng-random', 'id': 'r', 'filename': '/dev/hwrng'}").unwrap();
        assert_eq!(old, new);
        let Command::ObjectAdd(object) = new else { panic!() };
        assert_eq!(
            object.properties,
            [("filename".to_owned(), PropertyValue::from("/dev/hwrng"))]
        );
        let limits = object_add("{'qom-type': 'throttle-group', 'id': 't', 'props': {'limits': {'iops-total': 5}}}");
        let Ok(Command::ObjectAdd(object)) = limits else {
            panic!("{limits:?}")
        };
        assert!(matches!(&object.properties[0].1, PropertyValue::Struct(members) if members.len() == 1));
    }

    #[test]
    fn faults_have_the_texts_of_a_live_server() {
        for (text, expected) in [
            ("{}", "Parameter 'qom-type' is missing"),
            (
                "{'qom-type': 'nope', 'id': 'x'}",
                "Parameter 'qom-type' does not accept value 'nope'",
            ),
            (
                "{'qom-type': 'rng-random', 'id': 'r2', 'bogus': 1}",
                "Parameter 'bogus' is unexpected",
            ),
            (
                "{'qom-type': 'rng-random', 'id': 'r', 'props': 1}",
                "Invalid parameter type for 'props', expected: object",
            ),
            (
                "{'qom-type': 'rng-random', 'id': 'r', 'filename': 'a', 'props': {'filename': 'b'}}",
                "Parameter 'props.filename' is unexpected",
            ),
            (
                "{'qom-type': 'memory-backend-memfd', 'id': 'm'}",
                "Parameter 'size' is missing",
            ),
            (
                "{'qom-type': 'throttle-group', 'id': 't', 'limits': {'iops-zotal': 1}}",
                "Parameter 'limits.iops-zotal' is unexpected",
            ),
        ] {
            assert_eq!(object_add(text).unwrap_err(), expected, "{text}");
        }
    }

    #[test]
    fn answers_match_their_declaration() {
        let property = ObjectPropertyInfo {
            name: "x".into(),
            ty: "int".into(),
            description: Some("y".into()),
            default_value: Some(5i64.into()),
        };
        let ty = ObjectTypeInfo {
            name: "x".into(),
            is_abstract: Some(true),
            parent: Some("object".into()),
        };
        for (command, value) in [
            ("qom-list", ser::to_value(&[property]).unwrap()),
            ("qom-list-types", ser::to_value(&[ty]).unwrap()),
        ] {
            check::value(&find(command).unwrap().returns, value).unwrap();
        }
    }
}
