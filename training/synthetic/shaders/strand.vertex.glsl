// A ribbon of hair, lit at its vertices as thin cylinders. Source: Kajiya and Kay, 1989.
in vec3 position, tangent;
in vec4 strand;
uniform mat4 camera;
uniform vec3 middle;  // of the head
out vec4 place;
out vec3 diffuse, gleam;

void main() {
    place = strand;
    vec3 t = normalize(tangent), view = normalize(eye - position), outward = normalize(position - middle);
    vec3 normal = normalize(outward - t * dot(outward, t) + .35 * view);
    diffuse = surroundings(normal);
    gleam = vec3(0);
    float arrives = key_arrives(position, outward);
    for (int i = 0; i < 3; i++) {
        vec3 light = lights[2 * i];
        float sine = sqrt(max(0., 1. - pow(dot(t, light), 2.)));
        float wrapped = max(0., dot(normal, light) * .7 + .3) * mix(.6, 1., sine);
        float q = dot(t, normalize(light + view)) + .1 * (strand.z - .5);
        float shine = pow(sqrt(max(0., 1. - q * q)), 60.) * max(0., dot(outward, light) + .2);
        vec3 share = lights[2 * i + 1] * (i == 0 ? mix(.2, 1., arrives) : 1.);
        diffuse += share * wrapped;
        gleam += share * shine;
    }
    gl_Position = camera * vec4(position, 1);
}
