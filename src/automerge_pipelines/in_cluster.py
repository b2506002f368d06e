"""What can be asked of Kubernetes from inside a cluster."""


def secret_exists(name: str, namespace: str) -> bool | None:
    """Whether a namespace has a secret; None where that cannot be known: not in a cluster, no right, no answer.

    The content of the secret is never looked at.
    """
    import urllib3
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_incluster_config(configuration)
    except config.ConfigException:
        return None
    configuration.retries = urllib3.Retry(total=1)
    api = client.CoreV1Api(client.ApiClient(configuration))
    try:
        api.read_namespaced_secret(name, namespace, _preload_content=False, _request_timeout=(5, 10))
    except client.ApiException as error:
        return False if error.status == 404 else None
    except (urllib3.exceptions.HTTPError, OSError):
        return None
    return True
